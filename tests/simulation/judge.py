"""What must be true of a store's content, whatever happened on the way there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from agents.driver import PartitionDriver
from agents.keeping import Retained, unpack
from agents.messages.machine import MessagesMachine
from agents.ports import Applied, Record
from pipeline.memory_log import MemoryLog
from pipeline.stores.memory import MemoryStore
from pipeline.stores.memory_server import Entry, Hash, MemoryServer, Zset
from schemas import keys
from schemas.keys import Partition
from schemas.rules import Rules
from tests.driving import PARTITION, Driver, run

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
        assert isinstance(state, Retained)
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


def comparable(server: MemoryServer) -> Mapping[str, Entry | Applied]:
    """A content without what depends on how the log was cut into transactions."""
    content: dict[str, Entry | Applied] = dict(server.dump())
    content.pop(keys.journal(PARTITION), None)
    name = keys.applied(PARTITION)
    if name in content:
        packed = server.text(name)
        assert packed is not None
        applied = msgspec.json.decode(packed, type=Applied)
        content[name] = msgspec.structs.replace(applied, sequence=0, produced=0)
    return content


def check_equal(server: MemoryServer, expected: MemoryServer) -> None:
    """Two contents are the same; says where they are not."""
    here, there = comparable(server), comparable(expected)
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    told = [f"{name}: {here.get(name)}, but expected {there.get(name)}" for name in names]
    assert not told, "\n".join(told)


def clean_fold(
    records: Iterable[Record], rules: Rules, run_records_max: int = 1_000_000
) -> MemoryServer:
    """The content of a store that one owner filled from these records, without any trouble."""
    log, server = MemoryLog(lambda: 0), MemoryServer()
    held = list(records)
    log.records[PARTITION.topic, 0] = list(held)
    driver = new_driver(PARTITION, server, log, rules)
    run(driver.start())
    for start in range(0, len(held), run_records_max):
        run(driver.process(held[start : start + run_records_max]))
    run(driver.tend())
    return server


def new_driver(partition: Partition, server: MemoryServer, log: MemoryLog, rules: Rules) -> Driver:
    store = MemoryStore(partition, server)
    return PartitionDriver(partition, MessagesMachine(), store, log, rules, _unheard)


def _unheard(notice: str) -> None:
    """Notices are for people."""
