"""Dead letters are read from every kind of pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.agents.effects import SetState, StoreMessage
from millpond.pipeline.operate import dead_letters
from millpond.pipeline.operate.dead_letter_snapshot import DeadLetterSnapshot
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.pipeline.stack.ports import free_port
from millpond.pipeline.stores.registry import open_store
from millpond.schemas.errors import MillpondError, StoreDown
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool
from tests.contracts.store_worlds import FAR_MS, commit, transaction
from tests.support import given
from tests.support.redis_servers import RedisProcess, redis_process, until

HOST = "127.0.0.1"
SETTINGS = Settings(app="app", kafka=KafkaSettings(partitions=3))
PER_PARTITION = 700  # more than one page of the store


@pytest.fixture(params=["single", "sentinel", "cluster"])
def pool(
    request: pytest.FixtureRequest, single_redis: RedisProcess, tmp_path: Path
) -> Iterator[Pool]:
    """Each kind of pool in turn, empty."""
    single_redis.client.flushall()
    match request.param:
        case "single":
            yield Pool(name="pool1", servers=((HOST, single_redis.port),))
        case "sentinel":
            config = f"sentinel monitor mymaster {HOST} {single_redis.port} 1\n"
            with redis_process(tmp_path / "sentinel", sentinel=config) as sentinel:
                until(lambda: bool(sentinel.client.sentinel_masters()), "a primary")
                yield Pool(
                    name="pool1",
                    type="sentinel",
                    servers=((HOST, sentinel.port),),
                    sentinel="mymaster",
                )
        case _:
            nodes = request.getfixturevalue("three_nodes")
            for node in nodes:
                node.client.flushall()
            servers = tuple((HOST, node.port) for node in nodes)
            yield Pool(name="pool1", type="cluster", servers=servers)


def rules(pool: Pool) -> Rules:
    both = given.rules(
        given.queue("queue/#"),
        given.a_rule(
            hook="session.subscribed", topic="pubsub/#", action="on_message_fetch_for_pubsub"
        ),
    )
    return Rules(both.rules, (pool,))


async def store_dead(pool: Pool, partition: Partition, *dead: DeadMessage) -> None:
    """Store dead messages, as an agent does."""
    store = open_store(pool, partition)
    await store.load()
    effects: list[Any] = []
    for each in dead:
        event = given.published(each.message_id, each.topic)
        effects += [
            StoreMessage(1, event, each.at, indexed=False, expires_at=FAR_MS),
            SetState(each.message_id, msgspec.json.encode(each), "dead"),
        ]
    await commit(store, transaction(1, *effects))
    await store.close()


def dead_message(topic: str, number: int) -> DeadMessage:
    return DeadMessage(
        topic=topic, message_id=f"{topic}-{number:04}", reason="r", deliveries=5, at=number
    )


async def test_the_dead_letters_of_every_partition_and_agent_are_found(pool: Pool) -> None:
    for number in range(3):
        many = (dead_message(f"queue/{number}", at) for at in range(PER_PARTITION))
        await store_dead(pool, Partition("app", "queue", number), *many)
    await store_dead(pool, Partition("app", "pubsub", 2), dead_message("pubsub/a", 7))

    with DeadLetterSnapshot() as snapshot:
        assert await dead_letters.fill_snapshot(SETTINGS, rules(pool), None, snapshot) == 0
        assert len(snapshot) == 3 * PER_PARTITION + 1
        assert [dead.at for _, dead in snapshot.newest(3)] == [PER_PARTITION - 1] * 3
    with DeadLetterSnapshot() as snapshot:
        await dead_letters.fill_snapshot(SETTINGS, rules(pool), "+/a", snapshot)
        assert list(snapshot) == [("pubsub", dead_message("pubsub/a", 7))]

    ids = ["queue/2-0001", "pubsub/a-0007", "queue/0-0699"]
    found = await dead_letters.find(SETTINGS, rules(pool), ids)
    assert [each.dead.message_id for each in found] == ids
    with pytest.raises(MillpondError, match=r"letters: 'unknown', '\\udcff' \("):
        await dead_letters.find(SETTINGS, rules(pool), [*ids, "unknown", "\udcff"])
    shown, message = await dead_letters.show(SETTINGS, rules(pool), "pubsub/a-0007")
    assert (shown.agent, shown.dead) == ("pubsub", dead_message("pubsub/a", 7))
    assert message is not None
    assert (message.payload, message.client_id) == ("hello", "pub")


async def test_a_store_that_is_down_is_reported_at_once() -> None:
    down = Pool(name="pool1", servers=((HOST, free_port()),))
    with pytest.raises(StoreDown):
        await dead_letters.find(SETTINGS, rules(down), ["m"])
