"""Look-ups of the messages that EMQX retains, after publishes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from millpond.pipeline.brokers.emqx.rest import retained as retained_module
from millpond.pipeline.brokers.emqx.rest.client import RestClient
from millpond.pipeline.brokers.emqx.rest.retained import RetainedLookup
from millpond.schemas import codec
from millpond.schemas.events import MessagePublished, MessageRetained
from tests.support.emqx.broker import MOUNTED, Client, Emqx, Message, NoHooks
from tests.support.emqx.rest import EmqxRest, serving
from tests.support.emqx.scene import asking
from tests.support.emqx.trace import InMemoryProducer
from tests.support.workers import until


class Telling(NoHooks):
    """Requests a look-up after each publish, like the bridge."""

    lookups: RetainedLookup

    async def publish(self, message: Message) -> Message | None:
        text, encoding = codec.payload_text(message.payload)
        topic = message.topic.removeprefix(f"mp/{message.sender}/")
        event = MessagePublished(
            at=message.timestamp, node="n", message_id=message.id, topic=topic, qos=message.qos,
            retain=False, client_id=message.sender, payload=text, payload_encoding=encoding,
            published_at=message.timestamp, user_properties={"a": "b"},
        )  # fmt: skip
        self.lookups.ask(message.topic, event)
        return message


class Scene:
    def __init__(self, server: EmqxRest, rest: RestClient, client: Client) -> None:
        self.server, self.client = server, client
        self.durable_producer = InMemoryProducer()
        self.lookups = RetainedLookup(rest, self.durable_producer)

    def asked(self) -> int:
        return sum("retainer" in path for path in self.server.asked)

    async def until_asked(self, count: int) -> None:
        async def enough() -> bool:
            return self.asked() >= count

        await until(enough, f"{count} look-ups")

    async def until_told(self, count: int) -> list[MessageRetained]:
        async def enough() -> bool:
            return len(self.durable_producer.events) >= count

        await until(enough, f"{count} events")
        events = [
            event for event in self.durable_producer.events if isinstance(event, MessageRetained)
        ]
        assert len(events) == len(self.durable_producer.events) == count
        return events


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    hooks = Telling()
    emqx = Emqx(hooks)
    async with serving(emqx) as server, asking(server, tmp_path) as rest:
        client = await emqx.connect("c", listener=MOUNTED, username="u")
        scene = Scene(server, rest, client)
        hooks.lookups = scene.lookups
        looking = asyncio.create_task(scene.lookups.run())
        yield scene
        assert not looking.done()
        looking.cancel()
        await asyncio.wait((looking,))
    emqx.stop()


async def test_a_retained_publish_is_reported_under_its_topic_without_mountpoint(
    scene: Scene,
) -> None:
    await scene.client.publish("t", b"\xff", retain=True)
    (event,) = await scene.until_told(1)
    kept = scene.server.emqx.retained["mp/c/t"]
    assert event == MessageRetained(
        at=event.at, node="n", message_id=kept.id, topic="t", qos=1, retain=True, client_id="c",
        username="u", payload="/w==", payload_encoding="base64", published_at=kept.timestamp,
        user_properties={"a": "b"},
    )  # fmt: skip


async def test_a_publish_that_is_not_retained_is_not_reported(scene: Scene) -> None:
    await scene.client.publish("t", "x")
    await scene.until_asked(1)
    await scene.client.publish("u", "x", retain=True)
    (event,) = await scene.until_told(1)
    assert event.topic == "u"


async def test_a_look_up_that_can_never_succeed_is_given_up_and_delays_no_other(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.client.mountpoint = ""
    for _ in range(2):
        await scene.client.publish("..", "x", retain=True)
    await scene.client.publish("t", "x", retain=True)
    (event,) = await scene.until_told(1)
    assert event.topic == "t"
    assert "the retained message of '..' is not stored" in caplog.text
    assert "the bridge retries" not in caplog.text


async def test_a_cleared_message_is_reported_with_an_empty_payload(scene: Scene) -> None:
    await scene.client.publish("t", "x", retain=True)
    await scene.until_told(1)
    await scene.client.publish("t", "", retain=True)
    _, cleared = await scene.until_told(2)
    assert (cleared.topic, cleared.payload, cleared.client_id) == ("t", "", "c")


async def test_a_known_retained_message_is_not_reported_again(scene: Scene) -> None:
    await scene.client.publish("t", "x", retain=True)
    await scene.until_told(1)
    await scene.client.publish("t", "live")
    await scene.until_asked(2)
    await scene.client.publish("t", "y", retain=True)
    _, second = await scene.until_told(2)
    assert second.payload == "y"


async def test_the_message_of_an_earlier_publish_is_reported_with_its_own_fields(
    scene: Scene,
) -> None:
    scene.server.fault("/mqtt", 500)
    await scene.client.publish("t", "first", retain=True)
    await scene.client.publish("t", "live", qos=0)
    scene.server.heal()
    (event,) = await scene.until_told(1)
    kept = scene.server.emqx.retained["mp/c/t"]
    assert (event.payload, event.message_id) == ("first", kept.id)
    assert (event.published_at, event.user_properties) == (kept.timestamp, {})


async def test_many_publishes_of_a_topic_cost_one_look_up(scene: Scene) -> None:
    for number in range(50):
        await scene.client.publish("t", str(number), retain=True)
    (event,) = await scene.until_told(1)
    assert event.payload == "49"
    assert scene.asked() <= 2


async def test_a_clearing_publish_among_others_is_not_lost(scene: Scene) -> None:
    await scene.client.publish("t", "x", retain=True)
    await scene.until_told(1)
    fault = scene.server.fault("/mqtt", 503)
    await scene.client.publish("t", "", retain=True)

    async def failed() -> bool:
        return fault.seen >= 1

    await until(failed, "a look that failed")
    await scene.client.publish("t", "live")
    scene.server.heal()
    _, cleared = await scene.until_told(2)
    assert cleared.payload == ""


@pytest.mark.parametrize("kind", [400, 401, 404, 429, 500, 503, "cut", 200])
async def test_a_failed_look_up_is_retried(
    scene: Scene, kind: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    scene.server.fault("/mqtt", kind, times=2, body=b"<no>")
    await scene.client.publish("t", "x", retain=True)
    (event,) = await scene.until_told(1)
    assert event.payload == "x"
    assert "a look-up of a retained message failed" in caplog.text
    assert "answers look-ups of retained messages again" in caplog.text


async def test_a_look_up_whose_event_cannot_be_stored_is_retried(scene: Scene) -> None:
    scene.durable_producer.complaint = "the spool is full"
    await scene.client.publish("t", "x", retain=True)
    await scene.until_asked(2)
    scene.durable_producer.complaint = None
    await scene.until_told(1)


async def test_a_payload_that_emqx_does_not_return_is_an_error_in_the_log(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    await scene.client.publish("t", b"x" * (2 << 20), retain=True)
    await scene.until_asked(1)
    await scene.client.publish("u", "x", retain=True)
    await scene.until_told(1)
    assert "exceeds 1 MiB" in caplog.text


async def test_waiting_look_ups_are_bounded_and_missed_ones_counted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retained_module, "TOPICS_MAX", 2)
    await scene.server.stop()
    for number in range(5):
        await scene.client.publish(f"t{number}", "x", retain=True)
    assert scene.lookups.missed == 3
    assert caplog.text.count("later ones are missed") == 1
