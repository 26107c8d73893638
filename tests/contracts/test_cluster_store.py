"""The Cluster store: slots that move, nodes that die, and removals that run after the fence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from millpond.agents.effects import ClearRetained, DeleteBody, RunCommand, SetState, Unindex
from millpond.agents.reads import ReadIndex, ReadStates
from millpond.pipeline.stores.redis.cluster_store import ClusterStore
from millpond.pipeline.stores.redis.command_check import check_commands
from millpond.schemas import keys
from millpond.schemas.errors import StoreDown
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Rule
from millpond.schemas.rules.ruleset import Rules
from tests.contracts.store_worlds import PARTITION, ClusterWorld, applied, commit, kept, transaction
from tests.support.redis_servers import RedisProcess, cluster_processes, until


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[RedisProcess]]:
    """A cluster that the test may break."""
    with cluster_processes(tmp_path) as processes:
        yield processes


def owner(nodes: list[RedisProcess], slot: int) -> RedisProcess:
    """Return the node that names itself as the owner of a slot."""
    for node in nodes:
        for first, last, (_, port, *_rest), *_ in node.client.execute_command("CLUSTER SLOTS"):
            if first <= slot <= last and port == node.port:
                return node
    raise AssertionError(slot)


def node_id(node: RedisProcess) -> str:
    """Return the node's id in the cluster."""
    return str(node.client.execute_command("CLUSTER", "MYID").decode())


def begin_move(nodes: list[RedisProcess], slot: int) -> tuple[RedisProcess, RedisProcess]:
    """Begin to move a slot. The first node then redirects a client to the second one for keys that it does not have."""
    source = owner(nodes, slot)
    target = next(node for node in nodes if node is not source)
    target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
    source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(target))
    return source, target


def move(nodes: list[RedisProcess], slot: int) -> None:
    """Move a slot and its keys to another node."""
    source, target = begin_move(nodes, slot)
    moving = source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
    if moving:
        arguments = ["127.0.0.1", target.port, "", 0, 5_000, "KEYS", *moving]
        source.client.execute_command("MIGRATE", *arguments)
    for node in (target, source):
        node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", node_id(target))


async def test_the_store_follows_a_message_whose_slot_moved(nodes: list[RedisProcess]) -> None:
    store = ClusterWorld(nodes).store()
    await store.load()
    await commit(store, transaction(1, kept(1, "m1", "t")))
    move(nodes, key_slot(keys.message_index("t").encode()))
    assert await commit(store, transaction(2, kept(2, "m2", "t"))) == []
    assert await store.read([ReadIndex("t", 5)]) == [[("m1", 1_000_001), ("m2", 1_000_002)]]
    assert await commit(store, transaction(3, Unindex(3, "t", ("m1", "m2")))) == []
    assert await store.read([ReadIndex("t", 5)]) == [[]]
    await store.close()


async def test_the_store_follows_a_message_whose_slot_is_moving(nodes: list[RedisProcess]) -> None:
    store = ClusterWorld(nodes).store()
    await store.load()
    begin_move(nodes, key_slot(keys.message_index("t").encode()))
    assert await commit(store, transaction(1, kept(1, "m1", "t"))) == []
    assert await store.read([ReadIndex("t", 5)]) == [[("m1", 1_000_001)]]
    await store.close()


async def test_when_the_slot_of_the_state_moved_the_store_is_down_until_it_is_loaded_again(
    nodes: list[RedisProcess],
) -> None:
    store = ClusterWorld(nodes).store()
    await store.load()
    await commit(store, transaction(1, SetState("t", b"1")))
    move(nodes, key_slot(keys.applied(PARTITION).encode()))
    with pytest.raises(StoreDown):
        await commit(store, transaction(2, SetState("t", b"2")))
    until(
        lambda: all(owner_seen_by(node) == owner_seen_by(nodes[0]) for node in nodes),
        "every node knows the new owner",
    )
    assert (await store.load()).applied == applied(1)
    assert await commit(store, transaction(2, SetState("t", b"2"))) == []
    assert await store.read([ReadStates(("t",))]) == [{"t": b"2"}]
    await store.close()


def owner_seen_by(node: RedisProcess) -> Any:
    """Return the port of the owner of the state's slot, according to one node."""
    slot = key_slot(keys.applied(PARTITION).encode())
    for first, last, (_, port, *_rest), *_ in node.client.execute_command("CLUSTER SLOTS"):
        if first <= slot <= last:
            return port
    return None


async def test_without_one_node_no_transaction_is_applied(nodes: list[RedisProcess]) -> None:
    store = ClusterWorld(nodes).store()
    await store.load()
    home = owner(nodes, key_slot(keys.applied(PARTITION).encode()))
    other = next(node for node in nodes if node is not home)
    messages = [kept(number, f"m{number}", f"t{number}") for number in range(50)]
    other.kill()
    with pytest.raises(StoreDown):
        await commit(store, transaction(1, *messages, SetState("t", b"s")))
    assert home.client.get(keys.applied(PARTITION)) is None
    await store.close()


async def test_the_check_at_start_does_not_need_the_node_that_is_named_first(
    nodes: list[RedisProcess],
) -> None:
    servers = tuple(("127.0.0.1", node.port) for node in nodes)
    pool = Pool(name="p", type="cluster", servers=servers)
    rule = Rule(hook="message.publish", commands=(("INCR", "a"),), pool="p")
    nodes[0].kill()
    await check_commands(pool, Rules((rule,)))
    for node in nodes[1:]:
        node.kill()
    with pytest.raises(StoreDown, match=str(nodes[2].port)):
        await check_commands(pool, Rules((rule,)))


class CrashingStore(ClusterStore):
    """An owner that crashes between the fence and the removals."""

    async def _run_step(self, commands: Any, unless_on: Any = None) -> Any:
        if any(isinstance(source, Unindex | DeleteBody) for source in commands.sources):
            raise StoreDown("killed")
        return await super()._run_step(commands, unless_on)


async def test_the_next_owner_runs_once_the_removals_that_an_owner_left(
    three_nodes: list[RedisProcess],
) -> None:
    world = ClusterWorld(three_nodes)
    world.clear()
    crashing = CrashingStore(PARTITION, world.seeds, world.access)
    await crashing.load()
    await commit(crashing, transaction(1, kept(1, "m1", "t")))
    removals = (
        Unindex(2, "t", ("m1",)),
        DeleteBody("m1"),
        ClearRetained(2, "t"),
        RunCommand(2, (b"INCR", b"seen:\xff")),
    )
    with pytest.raises(StoreDown):
        await commit(crashing, transaction(2, *removals))
    assert keys.message_body("m1") in world.dump()
    await crashing.close()
    for _ in range(2):
        successor = world.store()
        assert (await successor.load()).applied == applied(2)
        await successor.close()
    content = {
        key: client.get(key)
        for client in world.clients
        for key in client.scan_iter()
        if not key.startswith(b"millpond:")
    }
    assert content == {b"seen:\xff": b"1"}
    assert not any(
        key.endswith(b":journal") for client in world.clients for key in client.scan_iter()
    )


async def test_a_single_server_is_refused_as_a_cluster(single_redis: RedisProcess) -> None:
    store = ClusterWorld([single_redis]).store()
    with pytest.raises(Exception, match="cluster"):
        await store.load()
    await store.close()
