"""A source of records for the partition of the messages agent: good, repeated and bad ones, by weight."""

from __future__ import annotations

from random import Random

from millpond.agents.topics.dedup import DEDUP_WINDOW_MS
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.schemas import codec, keys
from millpond.schemas.events import Event, MessagePublished, RulesChanged
from tests.support import given
from tests.support.partition import PARTITION

QUEUE = given.a_rule(hook="session.subscribed", topic="q/#", action="on_message_fetch_for_queue")
COUNT = given.command("INCR seen:${msgid}")
RULES = given.rules(
    QUEUE, given.store(expired_time=60), given.retain(expired_time=90), given.clear_retained(),
    given.receipt(expired_time=60), COUNT,
)  # fmt: skip
OTHER_RULES = (
    given.rules(given.store(store_qos0=True), given.retain(), COUNT),
    given.rules(
        QUEUE, given.store("t/0", expired_time=30), given.retain("t/1", expired_time=30), COUNT
    ),
)
AGENT_KEY = keys.agent_record_key(PARTITION.agent).encode()
KINDS = {
    "publish": 40, "retain": 20, "broker retains": 8, "clear": 8, "repeat": 15, "ack": 5, "unreadable": 4, "misplaced": 3,
    "bad topic": 2, "bad rules": 1, "other rules": 2, "another agent's": 5,
}  # fmt: skip


class Publisher:
    """Appends records to the log.

    `bad` are the offsets of the records that must become dead letters.
    """

    def __init__(self, random: Random, log: MemoryLog) -> None:
        self._random, self._log = random, log
        self._published: list[tuple[MessagePublished, int]] = []
        self._count = self._latest_ms = 0
        self.bad: set[int] = set()

    def append(self) -> None:
        """Append one record."""
        # The log's time is the highest timestamp of all records so far.
        latest_ms = (record.timestamp for record in self._log.records[PARTITION.topic, 0])
        self._latest_ms = max(self._latest_ms, self._log.now_ms(), *latest_ms)
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        match kind:
            case "unreadable":
                value = self._random.choice([None, b"", b"\xff", b"{}", b'{"type":"tick"}'])
                self._append_bad(b"t/0", value)
            case "misplaced":
                key = self._random.choice([b"t/2", b"", None, b"\xff"])
                self._append_bad(key, codec.encode(self._new("t/0")))
            case "bad topic":
                self._append_bad(b"t/+", codec.encode(self._new("t/+")))
            case "bad rules":
                bad = RulesChanged(at=0, node="n", agent="messages", rules="[{}]")
                self._append_bad(*given.key_and_value(bad))
            case "another agent's":
                key = self._random.choice([b"$millpond/queue", b"$millpond/pubsub"])
                self._log.append(PARTITION.topic, 0, key, b"of another agent")
            case _:
                self._append(self._event(kind))

    def _event(self, kind: str) -> Event:
        random = self._random
        topic = random.choice(["t/0", "t/1", "t/2", "q/0"])
        match kind:
            case "repeat" if recent := self._recent():
                return random.choice(recent)
            case "retain":
                return self._new(
                    topic, retain=True, qos=random.choice([0, 1]), expires_at=self._expiry()
                )
            case "broker retains" if recent := self._recent():
                event = random.choice(recent)
                # The agent may have lost this publish with the log. A repeat of it behind this record would then count as a
                # new message. So it is not repeated.
                self._published = [known for known in self._published if known[0] != event]
                return given.broker_retains(event)
            case "clear":
                return self._new(topic, retain=True, payload="")
            case "ack":
                return given.acked(f"m{random.randint(0, self._count)}", topic)
            case "other rules" if self._announced():
                rules = random.choice(OTHER_RULES).canonical()
                return RulesChanged(at=0, node="n", agent="messages", rules=rules)
            case _:
                return self._new(topic, qos=random.choice([0, 1, 1, 2]), expires_at=self._expiry())

    def _new(self, topic: str, **fields: object) -> MessagePublished:
        self._count += 1
        return given.published(f"m{self._count}", topic, **fields)

    def _announced(self) -> bool:
        """True if the log has the rules of an owner. A rebuild folds the first records by the first rules in the log."""
        records = self._log.records[PARTITION.topic, 0]
        of_agent = (x for x in records if x.key == AGENT_KEY and x.offset not in self.bad)
        return any(isinstance(codec.decode(record.value), RulesChanged) for record in of_agent)

    def _expiry(self) -> int | None:
        return self._random.choice([None, None, None, None, self._log.now_ms() + 5_000])

    def _recent(self) -> list[MessagePublished]:
        """Return publishes that are among the seen ids for certain."""
        return [
            event
            for event, at in self._published[-8:]
            if self._latest_ms - at < DEDUP_WINDOW_MS - 10_000
        ]

    def _append(self, event: Event) -> None:
        self._log.append(PARTITION.topic, 0, *given.key_and_value(event))
        if isinstance(event, MessagePublished) and event not in [
            known for known, _ in self._published
        ]:
            self._published.append((event, self._latest_ms))

    def _append_bad(self, key: bytes | None, value: bytes | None) -> None:
        self.bad.add(self._log.append(PARTITION.topic, 0, key, value).offset)
