"""The Redis store while its server is killed, paused, full, read-only or emptied. Every test has its own server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from millpond.agents.effects import RunCommand, SetState
from millpond.agents.reads import ReadStates
from millpond.pipeline.stores.redis.connection import Access
from millpond.schemas import keys
from millpond.schemas.errors import Fenced, StoreDown, StoreRefused
from tests.contracts.store_worlds import PARTITION, RedisWorld, applied, commit, kept, transaction
from tests.support.redis_servers import RedisProcess, redis_process, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server that keeps all acknowledged writes, also when it is killed."""
    with redis_process(tmp_path / "redis", appendonly="yes", appendfsync="always") as process:
        yield process


async def test_a_server_that_is_killed_during_a_commit_has_the_whole_batch_or_nothing(
    server: RedisProcess,
) -> None:
    world = RedisWorld(server)
    for number in range(6):
        world.clear()
        store = world.store()
        await store.load()
        await commit(store, transaction(1, SetState("t", b"old")))
        messages = [kept(offset, f"m{offset}", f"topic/{offset}") for offset in range(3_000)]
        new = store.pack(transaction(2, *messages, SetState("t", b"new")))
        in_flight = asyncio.ensure_future(store.commit(new))
        # Another moment each time. The checks below accept both outcomes.
        await asyncio.sleep(0.002 * number)
        server.kill()
        try:
            await in_flight
        except StoreDown:
            answered = False
        else:
            answered = True
        server.start()
        sequence = (await store.load()).applied
        assert sequence in ([applied(2)] if answered else [applied(1), applied(2)])
        was_applied = sequence == applied(2)
        assert len(world.dump()) == 2 + (6_000 if was_applied else 0)
        states = await store.read([ReadStates(("t",))])
        assert states == [{"t": b"new" if was_applied else b"old"}]
        await store.close()


async def test_a_silent_server_is_down_and_a_late_exec_is_noticed(
    server: RedisProcess,
) -> None:
    world = RedisWorld(server, Access(reply_timeout_s=0.3))
    store = world.store()
    await store.load()
    server.pause()
    with pytest.raises(StoreDown, match="no reply"):
        await commit(store, transaction(1, SetState("t", b"late")))
    server.resume()
    # The late EXEC runs before this load, and is then loaded; or after it, and then fences the next commit.
    stored = await store.load()
    try:
        sequence = 1 if stored.applied is None else 2
        await commit(store, transaction(sequence, SetState("t", b"mine")))
    except Fenced:
        assert (await store.load()).applied == applied(1)
        await commit(store, transaction(2, SetState("t", b"mine")))
    assert await store.read([ReadStates(("t",))]) == [{"t": b"mine"}]
    await store.close()


async def test_a_load_waits_for_a_server_that_is_down(server: RedisProcess) -> None:
    store = RedisWorld(server).store()
    await store.load()
    await commit(store, transaction(1))
    server.kill()
    with pytest.raises(StoreDown):
        await commit(store, transaction(2))
    loading = asyncio.ensure_future(store.load())
    await asyncio.sleep(0.2)
    assert not loading.done()
    server.start()
    assert (await loading).applied == applied(1)
    await store.close()


async def test_a_full_server_applies_nothing_and_is_down(server: RedisProcess) -> None:
    store = RedisWorld(server).store()
    await store.load()
    server.client.config_set("maxmemory", "1")
    batch = transaction(1, kept(1, "m1", "t"), SetState("t", b"s"))
    with pytest.raises(StoreDown, match="OOM"):
        await commit(store, batch)
    assert server.client.dbsize() == 0
    server.client.config_set("maxmemory", "0")
    assert (await store.load()).applied is None
    assert await commit(store, batch) == []
    await store.close()


async def test_a_server_that_refuses_every_write_is_tried_with_back_off(
    server: RedisProcess,
) -> None:
    store = RedisWorld(server).store()
    server.client.config_set("maxmemory", "1")
    before = server.client.info("stats")["total_connections_received"]
    tries = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(3):
            while True:
                await store.load()
                tries += 1
                with pytest.raises(StoreDown, match="OOM"):
                    await commit(store, transaction(1, kept(1, "m1", "t")))
    connections = server.client.info("stats")["total_connections_received"] - before
    assert 3 <= tries <= connections <= 12
    server.client.config_set("maxmemory", "0")
    await store.load()
    assert await commit(store, transaction(1, kept(1, "m1", "t"))) == []
    await store.close()


async def test_a_partition_that_is_fenced_again_and_again_is_loaded_with_back_off(
    server: RedisProcess,
) -> None:
    store = RedisWorld(server).store()
    tries = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(3):
            while True:
                await store.load()
                tries += 1
                with pytest.raises(Fenced):
                    await commit(store, transaction(2, SetState("t", b"s")))
    assert 3 <= tries <= 12
    await store.close()


async def test_a_server_that_cannot_write_its_disk_applies_nothing_and_is_down(
    tmp_path: Path,
) -> None:
    with redis_process(tmp_path / "redis", save="3600 1") as server:
        store = RedisWorld(server).store()
        await store.load()
        (server.directory / "dump.rdb" / "in the way").mkdir(parents=True)
        server.client.set("a", "change")
        server.client.bgsave()
        until(
            lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err",
            "a failed save",
        )
        with pytest.raises(StoreDown, match="MISCONF"):
            await commit(store, transaction(1, kept(1, "m1", "t")))
        assert server.client.keys() == [b"a"]
        await store.close()


async def test_a_primary_that_became_a_replica_is_down_until_it_is_primary_again(
    server: RedisProcess,
) -> None:
    store = RedisWorld(server).store()
    await store.load()
    server.client.replicaof("127.0.0.1", "1")
    with pytest.raises(StoreDown, match="READONLY"):
        await commit(store, transaction(1, kept(1, "m1", "t")))
    loading = asyncio.ensure_future(store.load())
    await asyncio.sleep(0.2)
    assert not loading.done()
    server.client.replicaof("NO", "ONE")
    assert (await loading).applied is None
    await store.close()


async def test_a_server_that_restarts_empty_has_no_state(tmp_path: Path) -> None:
    with redis_process(tmp_path / "redis") as server:
        store = RedisWorld(server).store()
        await store.load()
        await commit(store, transaction(1, kept(1, "m1", "t")))
        server.kill()
        server.start()
        with pytest.raises(StoreDown):
            await commit(store, transaction(2))
        assert (await store.load()).applied is None
        await store.close()


async def test_a_user_without_permission_is_refused_with_the_reason(server: RedisProcess) -> None:
    server.client.acl_setuser(
        "narrow", enabled=True, passwords="+secret", keys=["millpond:*"], commands=["+@all"]
    )
    store = RedisWorld(server, Access(username="narrow", password="secret")).store()
    await store.load()
    with pytest.raises(StoreRefused, match="NOPERM"):
        await commit(store, transaction(1, kept(1, "m1", "t")))
    assert server.client.dbsize() == 0
    await store.load()
    refused = await commit(store, transaction(1, RunCommand(3, (b"INCR", b"mine"))))
    assert [(each.offset, each.part) for each in refused] == [(3, "command")]
    assert refused[0].reason.startswith("NOPERM")
    server.client.acl_deluser("narrow")
    with pytest.raises(StoreDown):
        await commit(store, transaction(2))
    with pytest.raises(StoreRefused, match="WRONGPASS"):
        await store.load()
    await store.close()


async def test_a_user_that_may_not_use_transactions_is_refused_before_anything_is_written(
    server: RedisProcess,
) -> None:
    server.client.acl_setuser(
        "narrow", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-multi"]
    )
    store = RedisWorld(server, Access(username="narrow", password="")).store()
    with pytest.raises(StoreRefused, match="NOPERM"):
        await store.load()
    await store.close()


async def test_keys_that_millpond_did_not_write_are_named_in_the_refusal(
    server: RedisProcess,
) -> None:
    store = RedisWorld(server).store()
    server.client.set(keys.applied(PARTITION), "not JSON")
    with pytest.raises(StoreRefused, match="app:messages:7"):
        await store.load()
    server.client.delete(keys.applied(PARTITION))
    server.client.set(keys.table(PARTITION, "states"), "a string")
    await store.load()
    with pytest.raises(StoreRefused, match="WRONGTYPE"):
        await commit(store, transaction(1, SetState("t", b"s")))
    await store.close()


async def test_a_cancelled_commit_requires_a_load(server: RedisProcess) -> None:
    store = RedisWorld(server).store()
    await store.load()
    server.pause()
    in_flight = asyncio.ensure_future(store.commit(store.pack(transaction(1))))
    in_flight.cancel()
    with pytest.raises(asyncio.CancelledError):
        await in_flight
    server.resume()
    with pytest.raises(AssertionError):
        store.commit(store.pack(transaction(1)))
    assert (await store.load()).applied in (None, applied(1))
    await store.close()


async def test_a_batch_larger_than_the_socket_buffers_is_applied(server: RedisProcess) -> None:
    store = RedisWorld(server).store()
    await store.load()
    payload = "x" * (1 << 20)
    messages = [kept(offset, f"m{offset}", "t", payload=payload) for offset in range(24)]
    assert await commit(store, transaction(1, *messages)) == []
    assert server.client.zcard(keys.message_index("t")) == 24
    await store.close()
