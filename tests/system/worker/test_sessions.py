"""The sessions agent with real MQTT clients, a real Kafka and a real Redis."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from millpond.schemas import keys
from millpond.schemas.events import SubscriberJoined, SubscriberLeft
from tests.support import given
from tests.support.embedded_bridge import NODE, Bridge, reading
from tests.support.mqtt import PUBLISH, Client, delivered
from tests.support.workers import Pipeline, Worker, running, until

RULES = (
    given.a_rule(hook="client.connected", action="on_client_connected"),
    given.a_rule(hook="client.disconnected", action="on_client_disconnected"),
    given.a_rule(hook="client.connected", action="on_subscribe_lookup"),
    given.a_rule(hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue"),
    given.a_rule(hook="session.subscribed", topic="ret/#", action="on_retain_lookup"),
    given.store(),
    given.retain(),
)
CLIENTS = 200


@pytest.fixture
async def pipeline(
    app_name: str, kafka: str, redis_server: str, tmp_path: Path
) -> AsyncIterator[Pipeline]:
    async with running(app_name, kafka, redis_server, tmp_path) as started:
        started.configure(*RULES, batch_records_max=50)
        yield started


@pytest.fixture
async def bridge(pipeline: Pipeline, tmp_path: Path) -> AsyncIterator[Bridge]:
    bridge = Bridge(
        pipeline.bootstrap, tmp_path / "bridge", *RULES, sync_interval_s=5, app=pipeline.app
    )
    try:
        yield bridge.until_ready()
    finally:
        bridge.let_go()
        bridge.kill()


def millpond(pipeline: Pipeline, *arguments: str) -> str:
    """What a command prints."""
    config = str(pipeline.directory / "millpond.toml")
    done = subprocess.run(
        [sys.executable, "-m", "millpond", *arguments, "--config", config],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


async def presence(pipeline: Pipeline, client_id: str) -> dict[str, str]:
    found: Any = await pipeline.redis.hgetall(keys.presence(client_id))
    return {name.decode(): value.decode() for name, value in found.items()}


class Device:
    """A client that knows what it is: connected or not, and subscribed to what."""

    def __init__(self, bridge: Bridge, client_id: str, *, clean: bool) -> None:
        self.bridge, self.client_id, self.clean = bridge, client_id, clean
        self.connection: Client | None = None
        self.subscriptions: set[str] = set()

    async def connect(self) -> None:
        """Anew, or over the connection that there is."""
        if self.clean:
            self.subscriptions = set()
        self.connection = await self.bridge.connect(self.client_id, clean=self.clean)

    async def subscribe(self, topic_filter: str) -> None:
        assert self.connection is not None
        await self.connection.subscribe(topic_filter, 1)
        self.subscriptions.add(topic_filter)

    async def leave(self, *, politely: bool) -> None:
        if self.connection is not None:
            if politely:
                await self.connection.disconnect()
            else:
                self.connection.vanish()
            self.connection = None
            if self.clean:
                self.subscriptions = set()

    async def act(self, random: Random) -> None:
        choice = random.random()
        if self.connection is None or choice < 0.3:
            await self.connect()
        elif choice < 0.7:
            await self.leave(politely=choice < 0.5)
        else:
            await self.subscribe(f"queue/{random.randrange(5)}")


async def test_200_clients_are_what_they_know_of_themselves_whatever_happens_to_the_workers(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    random = Random(1)
    first = await pipeline.worker("sessions")
    devices = [Device(bridge, f"device-{at}", clean=at % 2 == 0) for at in range(CLIENTS)]
    await asyncio.gather(*(device.connect() for device in devices))
    for turn in range(6):
        acting = asyncio.gather(*(device.act(random) for device in devices))
        if turn == 1:
            first.signal(signal.SIGKILL)
            await first.ended()
            second = await pipeline.worker("sessions")
        if turn == 3:
            await pipeline.worker("sessions")
        if turn == 4:
            second.signal(signal.SIGTERM)
            assert await second.ended() == 0
        await acting

    online = {device.client_id for device in devices if device.connection is not None}

    async def right() -> bool:
        shown = {device.client_id: await presence(pipeline, device.client_id) for device in devices}
        node: Any = await pipeline.redis.hkeys(keys.node(NODE))
        return (
            {name for name, found in shown.items() if found.get("state") == "1"} == online
            and all(found for found in shown.values())
            and {name.decode() for name in node} == online
        )

    await until(right, "Redis to know who is online")

    def subscribed() -> dict[str, set[str]]:
        lines = millpond(pipeline, "clients", "list", "--json").splitlines()
        found = [json.loads(line) for line in lines]
        return {
            each["client_id"]: {held["topic_filter"] for held in each["subscriptions"]}
            for each in found
        }

    truth = {device.client_id: device.subscriptions for device in devices}

    async def registered() -> bool:
        return await asyncio.to_thread(subscribed) == truth

    await until(registered, "the registry to know who is subscribed to what")

    entitled = {
        (device.client_id, topic_filter)
        for device in devices
        if device.connection is not None
        for topic_filter in device.subscriptions
    }

    async def announced() -> bool:
        return await members(pipeline) == entitled

    await until(announced, "the members announced to be the members entitled")


async def members(pipeline: Pipeline) -> set[tuple[str, str]]:
    """What the delivery agents have been told, all in all."""
    found: dict[tuple[str, str], tuple[int, bool]] = {}
    async with reading(pipeline.bootstrap, from_start=True) as log:
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                await log.until(lambda: False, "all there is")
        for record in log.records:
            event = record.event
            if isinstance(event, SubscriberJoined | SubscriberLeft):
                name = event.client_id, event.topic_filter
                joined = isinstance(event, SubscriberJoined)
                found[name] = max(found.get(name, (-1, False)), (event.source_offset, joined))
    return {name for name, (_, joined) in found.items() if joined}


async def test_the_database_subscribes_a_client_when_it_connects(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    await pipeline.worker("sessions")
    await pipeline.redis.hset(keys.subscriptions("display"), "alerts/+", "1")
    display = await bridge.connect("display")

    async def proxied() -> bool:
        return "alerts/+" in await asyncio.to_thread(shown_subscriptions, pipeline, "display")

    await until(proxied, "the proxied subscription")
    publisher = await bridge.connect("publisher")
    publisher.publish("alerts/fire", b"run", 1)
    topic, payload, qos, _ = delivered(await display.next(PUBLISH))
    assert (topic, payload, qos) == ("alerts/fire", b"run", 1)
    assert "proxied" in millpond(pipeline, "clients", "show", "display")

    await display.disconnect()
    await pipeline.redis.delete(keys.subscriptions("display"))
    await pipeline.redis.hset(keys.subscriptions("display"), "news", "0")
    await bridge.connect("display")

    async def changed() -> bool:
        held = await asyncio.to_thread(shown_subscriptions, pipeline, "display")
        return held == ["news"]

    await until(changed, "the changed subscription")


def shown_subscriptions(pipeline: Pipeline, client_id: str) -> list[str]:
    found = json.loads(millpond(pipeline, "clients", "show", client_id, "--json"))
    return [held["topic_filter"] for held in found["subscriptions"]]


async def test_subscriptions_that_are_no_hash_are_a_dead_letter_that_names_the_key(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    await pipeline.worker("sessions")
    await pipeline.redis.set(keys.subscriptions("gw"), "x")
    await bridge.connect("gw")

    async def given_up() -> list[Any]:
        return await pipeline.dead_letters()

    (letter,) = await until(given_up, "a dead letter")
    reason = dict(letter.headers)["reason"].decode()
    assert "mqtt:sub:gw" in reason and "WRONGTYPE" in reason
    assert (letter.key, b"client.connected" in letter.value) == (b"gw", True)


async def test_a_command_that_cannot_be_read_is_a_dead_letter_and_the_next_is_carried_out(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    await pipeline.worker("sessions")
    await pipeline.producer.send_and_wait(keys.DELIVERIES_TOPIC, key=b"display", value=b"dance")
    await pipeline.redis.hset(keys.subscriptions("display"), "news", "0")
    await bridge.connect("display")

    async def given_up() -> list[Any]:
        return await pipeline.dead_letters()

    (letter,) = await until(given_up, "a dead letter")
    assert (letter.value, dict(letter.headers)["agent"]) == (b"dance", b"bridge")

    async def subscribed() -> bool:
        return await asyncio.to_thread(shown_subscriptions, pipeline, "display") == ["news"]

    await until(subscribed, "the next command to be carried out")


async def test_an_application_subscribes_and_unsubscribes_a_client_at_run_time(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    await pipeline.worker("sessions")
    await pipeline.worker("sessions")
    display = await bridge.connect("display")

    async def heard() -> bool:
        return dict(await pipeline.redis.pubsub_numsub("mqtt_channel"))[b"mqtt_channel"] == 2

    await until(heard, "both workers to listen")

    async def known() -> bool:
        return bool(await presence(pipeline, "display"))

    await until(known, "the client to be known")

    async def order(kind: str, topic: str) -> None:
        message = {"type": kind, "topic": topic, "clientid": "display", "qos": "1"}
        await pipeline.redis.publish("mqtt_channel", json.dumps(message))

    await order("subscribe", "a/+")
    await order("subscribe", "b")
    await order("unsubscribe", "b")
    await pipeline.redis.publish("mqtt_channel", "not an order")
    await pipeline.redis.publish("mqtt_channel", "x" * (5 << 20))  # larger than a record may be

    async def obeyed() -> bool:
        held = await asyncio.to_thread(shown_subscriptions, pipeline, "display")
        return held == ["a/+"]

    await until(obeyed, "the subscriptions that were ordered")
    publisher = await bridge.connect("publisher")
    publisher.publish("a/1", b"x", 1)
    assert delivered(await display.next(PUBLISH))[:3] == ("a/1", b"x", 1)

    async def given_up() -> list[Any]:
        letters = await pipeline.dead_letters()
        return letters if len(letters) == 2 else []

    letters = await until(given_up, "the dead letters of what is no order")
    assert sorted(letter.value[:5] for letter in letters) == [b"not a", b"xxxxx"]
    assert {dict(letter.headers)["source-channel"] for letter in letters} == {b"mqtt_channel"}
    await order("unsubscribe", "a/+")

    async def still_obeyed() -> bool:
        return await asyncio.to_thread(shown_subscriptions, pipeline, "display") == []

    await until(still_obeyed, "an order after what is none")


async def test_a_new_subscription_gets_each_stored_retained_message_once(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    await pipeline.worker("sessions")
    await pipeline.worker("messages")
    publisher = await bridge.connect("publisher")
    for name in ("a", "b"):
        publisher.publish(f"ret/{name}", name.encode(), 1, retain=True)

    async def stored() -> bool:
        return await pipeline.redis.exists(keys.retained("ret/a"), keys.retained("ret/b")) == 2

    await until(stored, "the retained messages to be stored")
    display = await bridge.connect("display")
    await display.subscribe("ret/+", 0)
    came = [
        delivered(packet) for packet in (await display.next(PUBLISH), await display.next(PUBLISH))
    ]
    assert [(topic, payload) for topic, payload, _, _ in came] == [("ret/a", b"a"), ("ret/b", b"b")]
    assert await display.silent()


async def test_the_clients_that_there_are_are_listed_and_one_that_is_unknown_is_said_to_be(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    await pipeline.worker("sessions")
    await bridge.connect("here")
    await bridge.connect("odd[/b]")
    await (await bridge.connect("gone")).disconnect()

    async def both() -> bool:
        table = await asyncio.to_thread(millpond, pipeline, "clients", "list")
        rows = {line.split()[0]: line.split()[1] for line in table.splitlines()[1:] if line.strip()}
        return (rows.get("here"), rows.get("odd[/b]"), rows.get("gone")) == ("yes", "yes", "no")

    await until(both, "both clients to be listed")
    config = str(pipeline.directory / "millpond.toml")
    done = subprocess.run(
        [sys.executable, "-m", "millpond", "clients", "show", "nobody", "--config", config],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the sessions agent knows no client 'nobody'" in done.stderr


async def test_clients_with_clean_sessions_leave_nothing_behind(
    pipeline: Pipeline, bridge: Bridge
) -> None:
    # Given rules that forget a client two seconds after it has gone
    leave = given.a_rule(
        hook="client.disconnected", action="on_client_disconnected", expired_time=2
    )
    pipeline.configure(*(leave if "on_client_disconnected" in rule else rule for rule in RULES))
    await pipeline.worker("sessions")
    # When many clients come and go, one of them with a session that continues, and one comes back
    for client_id in ("back", *(f"anonymous-{at}" for at in range(50))):
        await (await bridge.connect(client_id)).disconnect()
    lasting = await bridge.connect("lasting", clean=False)
    await lasting.subscribe("queue/a", 1)
    await lasting.disconnect()
    back = await bridge.connect("back")

    # Then Redis and the registry have these two alone
    async def shown() -> set[str]:
        prefix = keys.PRESENCE_PREFIX
        found = [key async for key in pipeline.redis.scan_iter(match=f"{prefix}*")]
        return {key.decode().removeprefix(prefix) for key in found}

    async def left() -> bool:
        return await shown() == {"back", "lasting"}

    await until(left, "the other clients to be forgotten")
    listed = await asyncio.to_thread(millpond, pipeline, "clients", "list", "--json")
    assert {each["client_id"] for each in map(json.loads, listed.splitlines())} == await shown()
    # And the next one is forgotten by a worker that starts after it has gone
    await back.disconnect()
    await until(lambda: pipeline.redis.hget(keys.presence("back"), "state"), "its end")
    for worker in pipeline.workers:
        worker.signal(signal.SIGKILL)
        await worker.ended()
    await pipeline.worker("sessions")

    async def only_lasting() -> bool:
        return await shown() == {"lasting"}

    await until(only_lasting, "the last client to be forgotten")


async def test_a_worker_that_is_told_another_partition_count_than_kafka_has_refuses(
    pipeline: Pipeline,
) -> None:
    pipeline.replays_as_live = False  # nothing lives
    config = pipeline.directory / "millpond.toml"
    config.write_text(config.read_text().replace("partitions = 4", "partitions = 5"))
    refused = Worker(config, pipeline.directory / "refused.log", "sessions")
    pipeline.workers.append(refused)
    assert await refused.ended() == 2
    said = refused.log.read_text()
    assert "mqtt.clients has 4: set partitions = 4" in said
    assert "Traceback" not in said
