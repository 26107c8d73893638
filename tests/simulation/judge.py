"""Invariants of the store's content that hold after every fault, and clean folds to compare it with."""

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
    """Check that every id has its body, every body a reference, and every topic at most one retained message."""
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
    assert not bodies - referenced, f"bodies without a reference: {bodies - referenced}"
    check_states(server)


def check_states(server: MemoryServer) -> None:
    """Check that the agent's state of retained messages equals the public keys."""
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
    """Check that nothing that is due by the log's time is left."""
    due = server.of(keys.due(PARTITION), Zset)
    assert all(at > now_ms for at in due.values()), f"overdue at {now_ms}: {due}"


def check_counters(server: MemoryServer) -> None:
    """Check that the user command `INCR seen:${msgid}` ran once for each message."""
    counters = {name: value for name, value in server.values.items() if name.startswith("seen:")}
    assert set(counters.values()) <= {b"1"}, f"counted more than once: {counters}"


def comparable(
    server: MemoryServer, partition: Partition = PARTITION
) -> Mapping[str, StoredValue | Applied]:
    """Return the content without the journal and the fields of the fence that depend on where batches end."""
    content: dict[str, StoredValue | Applied] = dict(server.dump())
    content.pop(keys.journal(partition), None)
    name = keys.applied(partition)
    if name in content:
        packed = server.text(name)
        assert packed is not None
        applied = msgspec.json.decode(packed, type=Applied)
        content[name] = msgspec.structs.replace(applied, sequence=0, produced=0)
    return content


def stored_fence(server: MemoryServer, partition: Partition = PARTITION) -> Applied | None:
    """Return the fence of a partition."""
    packed = server.text(keys.applied(partition))
    return None if packed is None else msgspec.json.decode(packed, type=Applied)


def check_equal(
    server: MemoryServer, expected: MemoryServer, partition: Partition = PARTITION
) -> None:
    """Check that two contents are equal. Name the keys that differ."""
    here, there = comparable(server, partition), comparable(expected, partition)
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    unequal = [f"{name}: {here.get(name)}, but expected {there.get(name)}" for name in names]
    assert not unequal, "\n".join(unequal)


def clean_fold(
    records: Iterable[Record],
    rules: Rules,
    run_records_max: int = 1_000_000,
    partition: Partition = PARTITION,
) -> MemoryServer:
    """Return the content of a store that one owner filled from these records, without any fault."""
    return fold_with_restarts(list(records), rules, [run_records_max], partition=partition)


def fold_with_restarts(
    records: Sequence[Record],
    rules: Rules,
    sizes: Sequence[int],
    *,
    owners: bool = False,
    again: int = 0,
    partition: Partition = PARTITION,
) -> MemoryServer:
    """Return the content of a store that was filled from these records in runs of these sizes, in turn.

    With `owners`, each run has a new owner. Each run begins with the last `again` records of the run before.
    """
    log, server = MemoryLog(lambda: 0), MemoryServer()
    log.records[partition.topic, 0] = list(records)
    driver = new_driver(partition, server, log, rules)
    run(driver.start())
    at = turn = 0
    while at < len(records):
        size = sizes[turn % len(sizes)]
        run(driver.process(records[max(0, at - again) : at + size]))
        at, turn = at + size, turn + 1
        if owners:
            run(driver.close())
            driver = new_driver(partition, server, log, rules)
            run(driver.start())
    run(driver.maintain())
    return server


def new_driver(partition: Partition, server: MemoryServer, log: MemoryLog, rules: Rules) -> Driver:
    store, machine = MemoryStore(partition, server), MACHINES[partition.agent]()
    return PartitionDriver(partition, machine, store, log, rules, _ignore)


def _ignore(notice: str) -> None:
    """Drop a notice of the driver."""
