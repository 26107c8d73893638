"""A seeded world of the messages agent in one thread.

1. Random actions: publish, step a worker, deliver a transaction, produce a record; and faults of workers, store and Kafka.
   There may be two owners, and one of them may not know that it is fenced.
2. The faults end, with one owner. Everything in flight arrives.
3. The judge compares the store with a clean fold of the same records, and the dead letters with the bad records.
4. Time passes beyond every lifetime, and the judge compares again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

from millpond.agents.ports import Record
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.schemas import keys
from tests.simulation import judge
from tests.simulation.publisher import RULES, Publisher
from tests.simulation.store import Store
from tests.simulation.worker import ToProduce, Worker, dead_letter_offset
from tests.support.partition import PARTITION

STEPS = 1_500
STEPS_TO_SETTLE_MAX = 20_000
START_MS = 1_000_000
TAIL_MS = 200_000  # longer than every lifetime
PLACE = PARTITION.topic, PARTITION.number


class World:
    """One run of one seed. docs/explanation/machines/driver.md has the invariants.

    - `to_produce`: records that Kafka does not have yet, in order for each worker.
    - `commits_arrive`: False while Kafka loses commits.
    - `dead_letters`: offset of a bad record → number of its dead letters.
    - `happened`: fault → how often it occurred.
    - `_all_records`: all records that the log ever had.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now_ms = START_MS
        self.log = MemoryLog(lambda: self.now_ms, run_records_max=self.random.choice([1, 3, 100]))
        self.store = Store()
        self.rules = RULES
        self.to_produce: list[ToProduce] = []
        self.commits_arrive = True
        self.workers: list[Worker] = []
        self.dead_letters: Counter[int] = Counter()
        self.happened: Counter[str] = Counter()
        self._publisher = Publisher(self.random, self.log)
        self._all_records: list[Record] = []
        actions: dict[Callable[[], None], float] = {
            self._publish: 12, self._step: 60, self._transmit: 25, self._produce: 12, self._pass_time: 3,
            self._crash: 1, self._pause: 0.7, self._resume: 0.7, self._release: 0.5, self._start_owner: 1,
            self._fail_store: 0.7, self._repair_store: 3, self._empty_store: 0.15, self._fail_over: 0.3,
            self._toggle_commits: 0.5, self._delete_records: 1, self._compare: 0.5,
        }  # fmt: skip
        # Each world scales its faults by itself. So some worlds combine few faults, and others many.
        scale = {action: self.random.choice([0, 0.5, 1, 3]) for action in list(actions)[5:]}
        self._actions = {
            action: weight * scale.get(action, 1) for action, weight in actions.items()
        }
        self._actions[self._repair_store] = 3

    # -- a run ------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Run the world, and check it."""
        self._start_owner()
        for _ in range(STEPS):
            (action,) = self.random.choices(list(self._actions), list(self._actions.values()))
            action()
        self._end_faults()
        self._settle()
        self._judge()
        self.now_ms = max(self.now_ms, self._log_ms) + TAIL_MS
        self._settle()
        self._judge()
        judge.check_nothing_overdue(self.store.content.server, self._log_ms)
        self.happened["fenced"] = self.store.fenced
        self.happened["records lost"] = self.workers[0].driver.records_lost

    def _end_faults(self) -> None:
        """Repair everything, and leave one owner."""
        staying = [worker for worker in self.workers if not worker.closing][-1:]
        for worker in self.workers:
            worker.paused = False
            if worker not in staying:
                worker.crash()
        self.workers = staying
        if not staying:
            self._start_owner()
        self.commits_arrive, self.store.down = True, False

    def _settle(self) -> None:
        for _ in range(STEPS_TO_SETTLE_MAX):
            if self._settled:
                return
            action = self.random.choice([self._step, self._deliver, self._produce])
            action()
            self.now_ms += 10
        raise AssertionError(f"stuck at {self.workers[0].driver.next_offset} of {self._end}")

    @property
    def _settled(self) -> bool:
        (worker,), stored = self.workers, self.store.stored
        due = worker.driver.machine.next_due_ms
        return (
            stored.applied is not None
            and stored.applied.offset + 1 == self._end == self.log.committed.get(PARTITION)
            and not (stored.journal or self.to_produce or self.store.in_flight)
            and (due is None or due > self.now_ms)
        )

    @property
    def _end(self) -> int:
        log = self.log.records[PLACE]
        return log[-1].offset + 1 if log else self.log.started_at[PLACE]

    @property
    def _log_ms(self) -> int:
        self._remember()
        return max((record.timestamp for record in self._all_records), default=0)

    # -- judgement --------------------------------------------------------------------------------------

    def _judge(self) -> None:
        self._compare()
        unanswered = self._publisher.bad - self.dead_letters.keys()
        assert not unanswered, f"no dead letters of {unanswered}"
        assert not self.dead_letters.keys() - self._publisher.bad, "a dead letter of a good record"

    def _compare(self) -> None:
        """Check that the content equals a clean fold of the records that the store has applied."""
        self._remember()
        server, missing, _ = self.store.content
        applied = self.store.applied
        if applied is None:
            return
        records = [
            record
            for record in self._all_records
            if record.offset <= applied.offset and record.offset not in missing
        ]
        judge.check_equal(server, judge.clean_fold(records, self.rules))
        judge.check_conservation(server)
        judge.check_counters(server)

    def _remember(self) -> None:
        known = self._all_records[-1].offset if self._all_records else -1
        self._all_records += [record for record in self.log.records[PLACE] if record.offset > known]

    # -- actions ----------------------------------------------------------------------------------------

    def _publish(self) -> None:
        self._publisher.append()

    def _pass_time(self) -> None:
        self.now_ms += self.random.choice([0, 1, 10, 1_000, 5_000, 29_999, 30_000, 60_001, -500])

    def _step(self) -> None:
        awake = [worker for worker in self.workers if not worker.paused]
        if awake:
            worker = self.random.choice(awake)
            worker.step()
            if worker.ended:
                self.workers.remove(worker)

    def _transmit(self) -> None:
        if not self.store.in_flight or self.store.down:
            return
        sent = self.random.choice(self.store.in_flight)
        fate = self.random.random()
        if fate < 0.06:
            self._happens("reply lost", lambda: self.store.arrive(sent, reply_lost=True))
        elif fate < 0.9:
            self.store.arrive(sent, reply_lost=False)
        elif fate < 0.95:
            self._happens("lost before it was applied", lambda: self.store.lose(sent))
        else:
            self._happens("given up, but in flight", lambda: self.store.give_up(sent))

    def _deliver(self) -> None:
        if self.store.in_flight:
            self.store.arrive(self.store.in_flight[0], reply_lost=False)

    def _produce(self) -> None:
        """Let Kafka take the oldest records of one worker."""
        if not self.to_produce:
            return
        worker = self.random.choice(self.to_produce).worker
        sent = next(sent for sent in self.to_produce if sent.worker is worker)
        self.to_produce.remove(sent)
        for record in sent.records:
            if record.topic == keys.DEAD_LETTERS_TOPIC:
                self._take_dead_letter(worker, dead_letter_offset(record))
            else:
                self.log.append(record.topic, record.partition or 0, record.key, record.value)
        sent.reply.answer(None)

    def _take_dead_letter(self, worker: Worker, offset: int) -> None:
        self.dead_letters[offset] += 1
        if self.dead_letters[offset] > 1:
            self.happened["a dead letter was sent again"] += 1
            assert offset in worker.owed, f"the dead letter of {offset} was produced twice"

    # -- faults -----------------------------------------------------------------------------------------

    def _happens(self, what: str, do: Callable[[], None]) -> None:
        self.happened[what] += 1
        do()

    def _any_worker(self) -> Worker | None:
        return self.random.choice(self.workers) if self.workers else None

    def _crash(self) -> None:
        worker = self._any_worker()
        if worker is not None:
            self._happens("crash", worker.crash)
            self.workers.remove(worker)
            # Records that the worker had not sent yet are lost.
            lost = self.random.randint(0, 3)
            own = [sent for sent in self.to_produce if sent.worker is worker]
            for sent in own[len(own) - lost :] if lost else []:
                self.to_produce.remove(sent)
        if not self.workers:
            self._start_owner()

    def _pause(self) -> None:
        worker = self._any_worker()
        if worker is not None:
            self.happened["pause"] += 1
            worker.paused = True

    def _resume(self) -> None:
        for worker in self.workers:
            worker.paused = False

    def _release(self) -> None:
        worker = self._any_worker()
        if worker is not None:
            self.happened["release"] += 1
            worker.closing = True

    def _start_owner(self) -> None:
        """Start a new owner. The old one, if any, does not notice."""
        if len(self.workers) < 2:
            self.happened["new owner"] += 1
            self.workers.append(Worker(self, self.happened["new owner"]))

    def _fail_store(self) -> None:
        self.happened["store down"] += 1
        self.store.down = True
        for sent in list(self.store.in_flight):
            self.store.give_up(sent)

    def _repair_store(self) -> None:
        self.store.down = False

    def _empty_store(self) -> None:
        self._happens("store emptied", self.store.empty)

    def _fail_over(self) -> None:
        self._happens("failover", self.store.fail_over)

    def _toggle_commits(self) -> None:
        self.commits_arrive = not self.commits_arrive

    def _delete_records(self) -> None:
        """Delete old records that are applied and committed. A store that loses data may need some of them again."""
        self._remember()
        applied = self.store.applied
        end = min(applied.offset + 1 if applied else 0, self.log.committed.get(PARTITION, 0))
        before = self.random.randint(0, end)
        if before > self.log.started_at[PLACE]:
            self._happens("retention", lambda: self.log.forget(*PLACE, before))
