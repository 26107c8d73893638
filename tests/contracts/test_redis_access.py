"""From a pool of the configuration to a store: credentials, TLS, Sentinel, and the check of user commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from millpond.agents.effects import SetState
from millpond.agents.reads import ReadStates
from millpond.pipeline.replay.target import check_not_live
from millpond.pipeline.stores.redis.command_check import check_commands
from millpond.pipeline.stores.redis.connection import Access
from millpond.pipeline.stores.redis.fence import Fence
from millpond.pipeline.stores.redis.keyspace import keyspace
from millpond.pipeline.stores.redis.location import connector, primary
from millpond.pipeline.stores.registry import open_store
from millpond.schemas.errors import ConfigError, MillpondError, StoreDown, StoreRefused
from millpond.schemas.rules.command_keys import KEY_FIELDS, MOVABLE_KEYS
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Rule
from millpond.schemas.rules.ruleset import Rules
from tests.contracts.store_worlds import PARTITION, applied, commit, transaction
from tests.support.redis_servers import RedisProcess, redis_process, replicated_redis
from tests.support.tls import certificate, tls_front

HOST = "127.0.0.1"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server with a user for Millpond, and a file with the user's password."""
    (tmp_path / "password").write_text("correct horse\nnot this line\n")
    with redis_process(tmp_path / "redis") as process:
        process.client.acl_setuser(
            "millpond",
            enabled=True,
            passwords="+correct horse",
            keys=["mqtt:*", "millpond:*"],
            commands=["+@all", "-@admin", "-@dangerous"],
        )
        process.client.config_set("requirepass", "for the operator only")
        yield process


async def test_a_pool_with_a_user_and_a_password_file_on_database_3_works_over_tls(
    server: RedisProcess, tmp_path: Path
) -> None:
    files = certificate(tmp_path)
    async with tls_front(files, server.port) as port:
        pool = Pool(
            name="p",
            servers=((HOST, port),),
            database=3,
            username="millpond",
            password_file=str(tmp_path / "password"),
            tls=True,
            ca_file=str(files.certificate),
        )
        store = open_store(pool, PARTITION)
        await store.load()
        assert await commit(store, transaction(1, SetState("t", b"s"))) == []
        assert await store.read([ReadStates(("t",))]) == [{"t": b"s"}]
        await store.close()
    assert server.client.info("keyspace").keys() == {"db3"}


async def test_a_certificate_of_an_unknown_authority_is_refused(
    server: RedisProcess, tmp_path: Path
) -> None:
    async with tls_front(certificate(tmp_path), server.port) as port:
        store = open_store(Pool(name="p", servers=((HOST, port),), tls=True), PARTITION)
        with pytest.raises(StoreRefused, match="certificate"):
            await store.load()
        await store.close()


@pytest.mark.parametrize(("username", "password"), [("millpond", "wrong"), (None, None)])
async def test_wrong_or_missing_credentials_are_refused_and_not_shown(
    server: RedisProcess, username: str | None, password: str | None
) -> None:
    servers = ((HOST, server.port),)
    pool = Pool(name="p", servers=servers, username=username, password=password)
    store = open_store(pool, PARTITION)
    with pytest.raises(StoreRefused) as raised:
        await store.load()
    assert "wrong" not in str(raised.value)
    await store.close()


def test_a_missing_password_file_is_named() -> None:
    pool = Pool(name="p", servers=((HOST, 1),), password_file="/not/there")
    with pytest.raises(ConfigError, match="/not/there"):
        open_store(pool, PARTITION)


async def test_sentinels_lead_to_the_primary_and_after_a_failover_to_the_new_one(
    tmp_path: Path,
) -> None:
    with replicated_redis(tmp_path) as redis:
        (first, second), (sentinel,) = redis.nodes, redis.sentinels
        pool = Pool(
            name="p",
            type="sentinel",
            servers=((HOST, 1), (HOST, sentinel.port)),
            sentinel="mymaster",
        )
        store = open_store(pool, PARTITION)
        await store.load()
        await commit(store, transaction(1, SetState("t", b"s")))
        assert first.client.wait(1, 20_000) == 1
        first.kill()
        with pytest.raises(StoreDown):
            await commit(store, transaction(2))
        assert (await store.load()).applied == applied(1)
        assert await commit(store, transaction(2, SetState("t", b"new"))) == []
        assert second.client.role()[0] == b"master"
        await store.close()


@pytest.fixture
def guarded_sentinel(tmp_path: Path) -> Iterator[RedisProcess]:
    """A sentinel that wants a password, which the file `watchword` holds, and knows a primary."""
    (tmp_path / "watchword").write_text("hush\n")
    with redis_process(tmp_path / "primary") as primary:
        config = f"sentinel monitor mymaster {HOST} {primary.port} 1\nrequirepass hush\n"
        with redis_process(tmp_path / "sentinel", sentinel=config) as sentinel:
            yield sentinel


def pool_of(sentinel: RedisProcess, **settings: Any) -> Pool:
    return Pool(
        name="p", type="sentinel", servers=((HOST, sentinel.port),), sentinel="mymaster", **settings
    )


async def test_sentinels_have_a_password_of_their_own(
    guarded_sentinel: RedisProcess, tmp_path: Path
) -> None:
    for username in (None, "default"):
        word = str(tmp_path / "watchword")
        pool = pool_of(guarded_sentinel, sentinel_username=username, sentinel_password_file=word)
        store = open_store(pool, PARTITION)
        await store.load()
        await store.close()


async def test_a_refusal_by_the_sentinels_is_recognised_as_such(
    guarded_sentinel: RedisProcess, tmp_path: Path
) -> None:
    (tmp_path / "wrong").write_text("wrong word\n")
    for file in (None, str(tmp_path / "wrong")):
        pool = pool_of(guarded_sentinel, sentinel_password_file=file, password="hush")
        store = open_store(pool, PARTITION)
        with pytest.raises(StoreRefused, match=r"the sentinel .*sentinel_password_file") as raised:
            await store.load()
        assert "wrong word" not in str(raised.value)
        await store.close()


async def test_a_server_that_is_no_sentinel_is_named(single_redis: RedisProcess) -> None:
    store = open_store(pool_of(single_redis), PARTITION)
    with pytest.raises(StoreRefused, match="is no sentinel"):
        await store.load()
    await store.close()


async def test_sentinels_that_know_no_primary_are_asked_again(
    guarded_sentinel: RedisProcess, tmp_path: Path
) -> None:
    word = str(tmp_path / "watchword")
    unknown = structs.replace(
        pool_of(guarded_sentinel, sentinel_password_file=word), sentinel="other"
    )
    for pool in (unknown, structs.replace(unknown, servers=((HOST, 1),))):
        with pytest.raises(StoreDown, match="no primary of 'other'"):
            await primary(pool, Access())


def rules(*fields: str) -> Rules:
    """Return one rule with one command."""
    rule = Rule(hook="message.publish", commands=(fields,), pool="p", file="a.toml", line=7)
    return Rules((rule,))


async def test_commands_that_the_server_knows_are_accepted(single_redis: RedisProcess) -> None:
    pool = Pool(name="p", servers=((HOST, single_redis.port),))
    for command in (
        ("INCR", "a"),
        ("hset", "a", "b", "c"),
        ("LPUSH", "a", "b", "c", "d"),
        ("XADD", "a", "*", "b", "c"),
        ("DEL", "a"),
        ("XGROUP", "CREATE", "a", "b", "$"),
    ):
        await check_commands(pool, rules(*command))
    await check_commands(pool, Rules())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("NOSUCH", "a"), "does not know the command NOSUCH"),
        (("HSETT", "a", "b", "c"), "does not know the command HSETT: did you mean 'HSET'?"),
        (("XGROUP", "NOSUCH", "a"), "does not know the command XGROUP NOSUCH"),
        (("INCR", "a", "b"), "INCR takes 1 arguments, not 2"),
        (("HSET", "a", "b"), "HSET takes at least 3 arguments, not 2"),
        (("CONFIG", "GET", "x"), "administers"),
        (("BLPOP", "a", "0"), "waits"),
        (("WATCH", "a"), "transaction"),
        (("SELECT", "1"), "connection"),
        (("SUBSCRIBE", "a"), "subscribes"),
        (("EVAL", "return 1", "0"), "script"),
    ],
)
async def test_commands_that_must_not_run_are_named_with_file_and_line(
    single_redis: RedisProcess, command: tuple[str, ...], reason: str
) -> None:
    pool = Pool(name="p", servers=((HOST, single_redis.port),))
    with pytest.raises(ConfigError, match=re.escape(reason)) as raised:
        await check_commands(pool, rules(*command))
    assert str(raised.value).startswith("a.toml:7: ")


def test_the_keys_of_commands_are_those_that_the_server_names(single_redis: RedisProcess) -> None:
    client = single_redis.client
    client.response_callbacks = {}
    places = {name: place for place, names in KEY_FIELDS.items() for name in names.split()}
    known = client.execute_command("COMMAND", "INFO", *places, *MOVABLE_KEYS)
    for name, info in zip([*places, *MOVABLE_KEYS], known, strict=True):
        # An older server does not have the newest commands. The keys of a container are those of its subcommands.
        if info:
            subcommands = [each for each in info[9] if not each[0].endswith(b"|help")]
            for _, _, flags, *described in subcommands or [info]:
                assert (b"movablekeys" in flags) == (name in MOVABLE_KEYS), name
                if name in places:
                    assert tuple(described[:3]) == places[name], name


async def test_a_payload_that_only_the_server_knows_to_be_a_key_is_refused(
    single_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(name="p", servers=((HOST, single_redis.port),))
    monkeypatch.setattr("millpond.pipeline.stores.redis.command_check.is_known", lambda _: False)
    await check_commands(pool, rules("SET", "last", "${payload}"))
    for command in (("SET", "${payload}", "v"), ("ZUNIONSTORE", "a", "1", "${payload}")):
        with pytest.raises(ConfigError, match="a payload as a key"):
            await check_commands(pool, rules(*command))


async def test_all_bad_commands_are_named_in_one_run(single_redis: RedisProcess) -> None:
    pool = Pool(name="p", servers=((HOST, single_redis.port),))
    two = (rules("NOSUCH", "a").rules[0], rules("INCR").rules[0])
    with pytest.raises(ConfigError) as raised:
        await check_commands(pool, Rules(two))
    assert len(raised.value.faults) == 2


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[tuple[Pool, Pool]]:
    """The pools of a primary and its replica, for a user that may neither ask for ROLE nor for INFO."""
    with (
        redis_process(tmp_path / "primary", repl_diskless_sync_delay=0) as primary,
        redis_process(tmp_path / "replica", replicaof=f"{HOST} {primary.port}") as replica,
    ):
        for server in (primary, replica):
            server.client.acl_setuser(
                "millpond",
                enabled=True,
                passwords="+word",
                keys=["mqtt:*", "millpond:*"],
                commands=["+@all", "-@admin", "-@dangerous", "-client|info"],
            )
        user = Pool(name="p", servers=((HOST, primary.port),), username="millpond", password="word")
        yield user, structs.replace(user, servers=((HOST, replica.port),))


async def test_one_tolerance_for_a_user_that_may_not_ask_for_the_role(
    unprivileged: tuple[Pool, Pool],
) -> None:
    primary, replica = unprivileged
    store = open_store(primary, PARTITION)
    await store.load()
    await store.close()
    async with keyspace(primary) as space:
        await space.check_primary()
        await check_not_live(space, primary, [], "app")
        assert await space.call("DBSIZE") == 0
    async with keyspace(replica) as space:
        with pytest.raises(StoreRefused, match="is a replica"):
            await space.check_primary()
    with pytest.raises(StoreDown, match="is a replica"):
        await Fence(await connector(replica)(), PARTITION).load()


async def test_the_live_database_is_recognised_under_another_address_without_permission_for_info(
    unprivileged: tuple[Pool, Pool],
) -> None:
    primary, _ = unprivileged
    alias = structs.replace(primary, servers=(("localhost", primary.servers[0][1]),))
    other = structs.replace(primary, database=1)
    async with keyspace(alias) as space:
        with pytest.raises(MillpondError, match="is the live store"):
            await check_not_live(space, alias, [primary], "app")
        await check_not_live(space, alias, [other], "app")
        assert await space.call("DBSIZE") == 0
