"""A partition in memory, for tests of the driver: a log, a store, and owners. It has no event loop and no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import Applied, OutgoingRecord, Record, Transaction
from millpond.agents.registry import MACHINES
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.pipeline.stores.memory.server import MemoryServer, Moment, Zset
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.schemas import codec, keys
from millpond.schemas.errors import StoreDown
from millpond.schemas.events import Event
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from tests.support import given

PARTITION = Partition("millpond", "messages", 0)
Driver = PartitionDriver[Transaction]
Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        result: Result = finished.value
        return result
    coroutine.close()
    raise AssertionError("the coroutine waits for something")


def waits(coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Continue a coroutine; True if it still waits."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    return True


class Log(MemoryLog):
    """Kafka. It acknowledges at once, or never while `acknowledges` is false."""

    acknowledges = True

    def produce(self, records: Sequence[OutgoingRecord]) -> Awaitable[None]:
        super().produce(records)
        return _Acknowledged(self)


class _Acknowledged(Awaitable[None]):
    def __init__(self, log: Log) -> None:
        self._log = log

    def __await__(self) -> Generator[None, None, None]:
        while not self._log.acknowledges:
            yield


async def _wait(awaitable: Awaitable[None]) -> None:
    await awaitable


class World:
    """One partition of one agent, with its log, its store and its rules. The log's clock is `now_ms`."""

    def __init__(self, *tables: str, partition: Partition = PARTITION) -> None:
        self.partition = partition
        self.now_ms = 10_000
        self.log = Log(lambda: self.now_ms)
        self.server = MemoryServer()
        self.rules = given.rules(*tables)
        self.notices: list[str] = []

    def append(self, *events: Event) -> list[Record]:
        """Append events, as a bridge writes them."""
        return [self.append_raw(*given.key_and_value(event)) for event in events]

    def append_raw(self, key: bytes | None, value: bytes | None) -> Record:
        return self.log.append(self.partition.topic, 0, key, value)

    def append_tick(self, driver: Driver, wall_ms: int) -> None:
        """Append the tick that an owner sends at this time."""
        tick = driver.tick(wall_ms)
        assert tick is not None
        run(_wait(self.log.produce([tick])))

    def new_store(self) -> MemoryStore:
        """Return the store of a new owner."""
        return MemoryStore(self.partition, self.server)

    def owner(self, rules: Rules | None = None) -> Driver:
        """Return a new owner of the partition."""
        store = self.new_store()
        machine = MACHINES[self.partition.agent]()
        configured = self.rules if rules is None else rules
        return PartitionDriver(
            self.partition, machine, store, self.log, configured, self.notices.append
        )

    def started(self, rules: Rules | None = None) -> Driver:
        """Return a new owner that has loaded the state, and has announced its rules."""
        driver = self.owner(rules)
        run(driver.start())
        return driver

    def unread(self, driver: Driver) -> list[Record]:
        log = self.log.records[self.partition.topic, 0]
        return [record for record in log if record.offset >= driver.next_offset]

    def feed(self, driver: Driver) -> None:
        """Fold the rest of the log, and wait for store and Kafka."""
        run(driver.process(self.unread(driver)))
        run(driver.settle())

    def commit(self, driver: Driver) -> None:
        """Commit the committable offset to Kafka, as the worker does from time to time."""
        if driver.committable is not None:
            self.log.committed[self.partition] = driver.committable

    @property
    def applied(self) -> Applied | None:
        return run(MemoryStore(self.partition, self.server).load()).applied

    @property
    def journal(self) -> list[int]:
        return list(run(MemoryStore(self.partition, self.server).load()).journal)

    def stored(self, topic: str = "t") -> list[str]:
        """Return the message ids in a topic's index; each must have its body."""
        index = self.server.of(keys.message_index(topic), Zset)
        assert all(keys.message_body(message_id) in self.server.values for message_id in index)
        return list(index)

    def text(self, key: str) -> str | None:
        value = self.server.text(key)
        return None if value is None else value.decode()

    def counted_once(self, *names: str) -> bool:
        """True if a rule `INCR seen:${msgid}` ran once for each of these ids."""
        return all(self.text(f"seen:{name}") == "1" for name in names)

    @property
    def dead_letter_counts(self) -> Counter[int]:
        """Offset of a record → how many dead letters were produced for it."""
        return Counter(int(dict(each.headers)["source-offset"]) for each in self.dead_letters)

    @property
    def dead_letters(self) -> list[OutgoingRecord]:
        return [sent for sent in self.log.produced if sent.topic == keys.DEAD_LETTERS_TOPIC]

    @property
    def written(self) -> list[Event]:
        """The events that owners produced into the partition."""
        own = [sent for sent in self.log.produced if sent.topic == self.partition.topic]
        return [codec.decode(sent.value) for sent in own]


def once(moment: Moment) -> Callable[[Moment, Partition], None]:
    """Return a fault: the store is down at the first such moment, and then works again."""
    left = [moment]

    def fault(at: Moment, partition: Partition) -> None:
        if left and at == left[0]:
            left.clear()
            raise StoreDown(f"down at {at}")

    return fault
