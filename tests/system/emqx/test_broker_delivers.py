"""An EMQX without a mountpoint: it delivers itself, and Millpond delivers what was stored before a subscription."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.pipeline.brokers.emqx.bridge import EmqxBridge
from millpond.pipeline.settings import BridgeSettings, Settings
from millpond.schemas.errors import ConfigError
from tests.support import given
from tests.support.emqx.broker import ORDINARY
from tests.support.emqx.world import a_world, numbered, publish


async def test_without_a_mountpoint_a_new_subscription_gets_the_stored_messages(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> None:
    async with a_world(
        app_name, kafka, redis_server, tmp_path, given.queue("queue/#"),
        agents=("sessions", "queue"), mounted=False,
    ) as world:  # fmt: skip
        publisher = await world.emqx.connect("publisher", listener=ORDINARY)
        await publish(publisher, "queue/a", *numbered(0, 10))
        await world.until_stored("queue/a", 10)
        consumer = await world.emqx.connect("consumer", listener=ORDINARY)
        await consumer.subscribe("queue/a")
        await consumer.until_received(10)
        await world.until_stored("queue/a", 0)
        await publish(publisher, "queue/a", *numbered(10, 20))
        await world.until_stored("queue/a", 0)
        await consumer.settle()
        assert consumer.payloads == numbered(0, 20)


async def test_without_a_mountpoint_a_pubsub_rule_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a:b")
    settings = Settings(bridge=BridgeSettings(kind="emqx", api_key_file=str(tmp_path / "key")))
    with pytest.raises(ConfigError, match="a pubsub rule needs"):
        EmqxBridge(settings, given.rules(given.pubsub()))
