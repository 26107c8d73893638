"""What must be true of a store's content, whatever happened on the way there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from millpond.agents.driver.driver import PartitionDriver
from millpond.agents.ports import Applied, Record
from millpond.agents.registry import MACHINES
from millpond.agents.topics.storage import RetainedState, unpack
from millpond.pipeline.kafka.memory_log import MemoryLog
from millpond.pipeline.stores.memory.server import Hash, MemoryServer, StoredValue, Zset
from millpond.pipeline.stores.memory.store import MemoryStore
from millpond.schemas import keys
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from tests.support.partition import PARTITION, Driver, run

INDEX, RETAINED = keys.message_index(""), keys.retained("")


def check_conservation(server: MemoryServer) -> None:
    """No id without its body, no body without a reference, at most one retained message, scores in order."""
    referenced: set[str] = set()
    indexes = {name: value for name, value in server.values.items() if isinstance(value, Zset)}
    for name, entries in indexes.items():
        if name.startswith(RETAINED):
            assert len(entries) == 1, f"{name} holds {list(entries)}"
        if name.startswith((INDEX, RETAINED)):
            referenced |= {keys.message_body(message_id) for message_id in entries}
    bodies = {
        name
        for name, value in server.values.items()
        if name.startswith(INDEX) and isinstance(value, Hash)
    }
    assert not referenced - bodies, f"ids without a body: {referenced - bodies}"
    assert not bodies - referenced, f"bodies that nobody refers to: {bodies - referenced}"
    check_states(server)


def check_states(server: MemoryServer) -> None:
    """What the agent knows of retained messages is what readers see."""
    packed = server.of(keys.table(PARTITION, "states"), Hash)
    states = {topic: unpack(state) for topic, state in packed.items()}
    seen = {
        name.removeprefix(RETAINED): value
        for name, value in server.values.items()
        if name.startswith(RETAINED)
    }
    assert states.keys() == seen.keys()
    for topic, state in states.items():
        assert isinstance(state, RetainedState)
        assert seen[topic] == {state.message_id: state.score}
        index = server.of(keys.message_index(topic), Zset)
        assert state.indexed == (state.message_id in index)


def check_nothing_overdue(server: MemoryServer, now_ms: int) -> None:
    """What was due by the log's clock has been done."""
    due = server.of(keys.due(PARTITION), Zset)
    assert all(at > now_ms for at in due.values()), f"overdue at {now_ms}: {due}"


def check_counters(server: MemoryServer) -> None:
    """The user's `INCR seen:${msgid}` ran once for each message."""
    counters = {name: value for name, value in server.values.items() if name.startswith("seen:")}
    assert set(counters.values()) <= {b"1"}, f"counted more than once: {counters}"


def comparable(
    server: MemoryServer, partition: Partition = PARTITION
) -> Mapping[str, StoredValue | Applied]:
    """A content without what depends on how the log was cut into transactions."""
    content: dict[str, StoredValue | Applied] = dict(server.dump())
    content.pop(keys.journal(partition), None)
    name = keys.applied(partition)
    if name in content:
        packed = server.text(name)
        assert packed is not None
        applied = msgspec.json.decode(packed, type=Applied)
        content[name] = msgspec.structs.replace(applied, sequence=0, produced=0)
    return content


def check_equal(
    server: MemoryServer, expected: MemoryServer, partition: Partition = PARTITION
) -> None:
    """Two contents are the same; says where they are not."""
    here, there = comparable(server, partition), comparable(expected, partition)
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    told = [f"{name}: {here.get(name)}, but expected {there.get(name)}" for name in names]
    assert not told, "\n".join(told)


def clean_fold(
    records: Iterable[Record],
    rules: Rules,
    run_records_max: int = 1_000_000,
    partition: Partition = PARTITION,
) -> MemoryServer:
    """The content of a store that one owner filled from these records, without any trouble."""
    held = list(records)
    return fold_with_restarts(held, rules, [run_records_max], partition=partition)


def fold_with_restarts(
    held: Sequence[Record],
    rules: Rules,
    sizes: Sequence[int],
    *,
    owners: bool = False,
    again: int = 0,
    partition: Partition = PARTITION,
) -> MemoryServer:
    """Cut into runs of these sizes in turn, each with a new owner, or all with one; before each run, the last `again`
    records are handed over once more.
    """
    log, server = MemoryLog(lambda: 0), MemoryServer()
    log.records[partition.topic, 0] = list(held)
    driver = new_driver(partition, server, log, rules)
    run(driver.start())
    at = turn = 0
    while at < len(held):
        size = sizes[turn % len(sizes)]
        run(driver.process(held[max(0, at - again) : at + size]))
        at, turn = at + size, turn + 1
        if owners:
            run(driver.close())
            driver = new_driver(partition, server, log, rules)
            run(driver.start())
    run(driver.maintain())
    return server


def new_driver(partition: Partition, server: MemoryServer, log: MemoryLog, rules: Rules) -> Driver:
    store, machine = MemoryStore(partition, server), MACHINES[partition.agent]()
    return PartitionDriver(partition, machine, store, log, rules, _unheard)


def _unheard(notice: str) -> None:
    """Notices are for people."""
