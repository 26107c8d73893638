"""A seeded world in one thread: publishers, owners that crash, sleep and succeed each other, a store and a Kafka
that fail; then the faults end and everything has to come right."""

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
from tests.simulation.worker import ToProduce, Worker, letter_offset
from tests.support.partition import PARTITION

STEPS = 1_500
STEPS_TO_SETTLE_MAX = 20_000
START_MS = 1_000_000
TAIL_MS = 200_000  # longer than any lifetime: afterwards nothing is left that expires
PLACE = PARTITION.topic, PARTITION.number


class World:
    """One run of one seed. See `agents/driver/driver.py` for what is promised."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now_ms = START_MS
        self.log = MemoryLog(lambda: self.now_ms, run_records_max=self.random.choice([1, 3, 100]))
        self.store = Store()
        self.rules = RULES
        self.to_produce: list[ToProduce] = []
        self.commits_arrive = True
        self.workers: list[Worker] = []
        self.letters: Counter[int] = Counter()
        self.happened: Counter[str] = Counter()
        self._publisher = Publisher(self.random, self.log)
        self._everything: list[Record] = []  # what the log ever held
        actions: dict[Callable[[], None], float] = {
            self._publish: 12, self._step: 60, self._transmit: 25, self._produce: 12, self._pass_time: 3,
            self._crash: 1, self._sleep: 0.7, self._wake: 0.7, self._release: 0.5, self._succeed: 1,
            self._fail_store: 0.7, self._mend_store: 3, self._empty_store: 0.15, self._fail_over: 0.3,
            self._lose_commits: 0.5, self._retain: 1, self._compare: 0.5,
        }  # fmt: skip
        # Each world has faults of its own: some are rare in one and common in another.
        scale = {action: self.random.choice([0, 0.5, 1, 3]) for action in list(actions)[5:]}
        self._actions = {
            action: weight * scale.get(action, 1) for action, weight in actions.items()
        }
        self._actions[self._mend_store] = 3

    # -- a run ------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Trouble, then rest, then the judgement."""
        self._succeed()
        for _ in range(STEPS):
            (action,) = self.random.choices(list(self._actions), list(self._actions.values()))
            action()
        self._rest()
        self._settle()
        self._judge()
        self.now_ms = max(self.now_ms, self._log_ms) + TAIL_MS
        self._settle()
        self._judge()
        judge.check_nothing_overdue(self.store.content.server, self._log_ms)
        self.happened["fenced"] = self.store.fenced
        self.happened["records lost"] = self.workers[0].driver.records_lost

    def _rest(self) -> None:
        """No faults any more, and one owner."""
        staying = [worker for worker in self.workers if not worker.closing][-1:]
        for worker in self.workers:
            worker.paused = False
            if worker not in staying:
                worker.crash()
        self.workers = staying
        if not staying:
            self._succeed()
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
            and not (stored.journal or self.to_produce or self.store.wire)
            and (due is None or due > self.now_ms)
        )

    @property
    def _end(self) -> int:
        log = self.log.records[PLACE]
        return log[-1].offset + 1 if log else self.log.started_at[PLACE]

    @property
    def _log_ms(self) -> int:
        self._remember()
        return max((record.timestamp for record in self._everything), default=0)

    # -- judgement --------------------------------------------------------------------------------------

    def _judge(self) -> None:
        self._compare()
        unanswered = self._publisher.bad - self.letters.keys()
        assert not unanswered, f"no dead letters of {unanswered}"
        assert not self.letters.keys() - self._publisher.bad, "a dead letter of a good record"

    def _compare(self) -> None:
        """The content is that of a clean fold of the same records."""
        self._remember()
        server, missing, _ = self.store.content
        applied = self.store.applied
        if applied is None:
            return
        records = [
            record
            for record in self._everything
            if record.offset <= applied.offset and record.offset not in missing
        ]
        judge.check_equal(server, judge.clean_fold(records, self.rules))
        judge.check_conservation(server)
        judge.check_counters(server)

    def _remember(self) -> None:
        known = self._everything[-1].offset if self._everything else -1
        self._everything += [record for record in self.log.records[PLACE] if record.offset > known]

    # -- what goes on -----------------------------------------------------------------------------------

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
        if not self.store.wire or self.store.down:
            return
        sent = self.random.choice(self.store.wire)
        fate = self.random.random()
        if fate < 0.06:
            self._happens("reply lost", lambda: self.store.arrive(sent, reply_lost=True))
        elif fate < 0.9:
            self.store.arrive(sent, reply_lost=False)
        elif fate < 0.95:
            self._happens("lost before it was applied", lambda: self.store.lose(sent))
        else:
            self._happens("given up, yet on the wire", lambda: self.store.give_up(sent))

    def _deliver(self) -> None:
        if self.store.wire:
            self.store.arrive(self.store.wire[0], reply_lost=False)

    def _produce(self) -> None:
        """Kafka takes the oldest records of one worker."""
        if not self.to_produce:
            return
        worker = self.random.choice(self.to_produce).worker
        sent = next(sent for sent in self.to_produce if sent.worker is worker)
        self.to_produce.remove(sent)
        for record in sent.records:
            if record.topic == keys.DEAD_LETTERS_TOPIC:
                self._take_letter(worker, letter_offset(record))
            else:
                self.log.append(record.topic, record.partition or 0, record.key, record.value)
        sent.reply.answer(None)

    def _take_letter(self, worker: Worker, offset: int) -> None:
        self.letters[offset] += 1
        if self.letters[offset] > 1:
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
            lost = self.random.randint(0, 3)  # what it had not handed to the network yet
            own = [sent for sent in self.to_produce if sent.worker is worker]
            for sent in own[len(own) - lost :] if lost else []:
                self.to_produce.remove(sent)
        if not self.workers:
            self._succeed()

    def _sleep(self) -> None:
        worker = self._any_worker()
        if worker is not None:
            self.happened["pause"] += 1
            worker.paused = True

    def _wake(self) -> None:
        for worker in self.workers:
            worker.paused = False

    def _release(self) -> None:
        worker = self._any_worker()
        if worker is not None:
            self.happened["release"] += 1
            worker.closing = True

    def _succeed(self) -> None:
        """A new owner, whether or not the old one knows."""
        if len(self.workers) < 2:
            self.happened["new owner"] += 1
            self.workers.append(Worker(self, self.happened["new owner"]))

    def _fail_store(self) -> None:
        self.happened["store down"] += 1
        self.store.down = True
        for sent in list(self.store.wire):
            self.store.give_up(sent)

    def _mend_store(self) -> None:
        self.store.down = False

    def _empty_store(self) -> None:
        self._happens("store emptied", self.store.empty)

    def _fail_over(self) -> None:
        self._happens("failover", self.store.fail_over)

    def _lose_commits(self) -> None:
        self.commits_arrive = not self.commits_arrive

    def _retain(self) -> None:
        """Kafka drops old records: what is applied and committed, some of which a store may yet want again."""
        self._remember()
        applied = self.store.applied
        end = min(applied.offset + 1 if applied else 0, self.log.committed.get(PARTITION, 0))
        before = self.random.randint(0, end)
        if before > self.log.started_at[PLACE]:
            self._happens("retention", lambda: self.log.forget(*PLACE, before))
