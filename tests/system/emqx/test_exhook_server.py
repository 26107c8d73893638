"""The ExHook server over real gRPC: versions, order, health, TLS, shared ports, its stop, and malformed requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from millpond.pipeline.brokers.emqx.copy_topic import CopyTopic
from millpond.pipeline.brokers.emqx.exhook import exhook_pb2 as pb
from millpond.pipeline.brokers.emqx.exhook.hooks import Version
from millpond.pipeline.brokers.emqx.exhook.server import service_name
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas.errors import ConfigError
from millpond.schemas.events import (
    ClientConnected,
    DeliveriesSent,
    MessageAcked,
    MessagePublished,
    SessionCreated,
    SessionSubscribed,
)
from tests.support import given
from tests.support.embedded_bridge import Log, make_topics, reading
from tests.support.emqx.trace import (
    SERVICE,
    InMemoryProducer,
    a_client,
    a_message,
    a_publish,
    path,
    trace,
)
from tests.support.exhook_server import SECRET, Provider, answering, serving, unary
from tests.support.tls import certificate
from tests.support.workers import until

RULES = given.rules(
    given.queue("queue/#"), given.store("#"), given.receipt("message.delivered"),
    given.receipt("message.acked"),
)  # fmt: skip
MOUNTPOINT = Mountpoint("mp/${clientid}/")
CONNECTIONS = 8  # EMQX's pool_size
CROWD = 5_000  # calls at once
Status = health_pb2.HealthCheckResponse


@pytest.fixture
async def bootstrap(kafka: str) -> str:
    await make_topics(kafka)
    return kafka


@pytest.fixture
async def log(bootstrap: str) -> AsyncIterator[Log]:
    async with reading(bootstrap) as log:
        yield log


# -- order


async def live(channel: grpc.aio.Channel, client_id: str, publishes: int) -> None:
    """The calls of a client's life. Each waits for the answer of the one before, all over one connection."""
    client = a_client(client_id)

    async def call(name: str, request: bytes) -> None:
        await unary(channel, path("v3", name))(request)

    await call("OnSessionCreated", pb.SessionCreatedRequest(clientinfo=client).SerializeToString())
    connected = pb.ClientConnectedRequest(clientinfo=client)
    await call("OnClientConnected", connected.SerializeToString())
    for number in range(publishes):
        name = f"{client_id}/{number % 2}"
        subscribed = pb.SessionSubscribedRequest(clientinfo=client, topic=f"f/{number}")
        await call("OnSessionSubscribed", subscribed.SerializeToString())
        message = a_message(name, f"{client_id}-{number}", from_client_id=client_id)
        published = pb.MessagePublishRequest(message=message)
        await call("OnMessagePublish", published.SerializeToString())
        acked = pb.MessageAckedRequest(clientinfo=client, message=message)
        await call("OnMessageAcked", acked.SerializeToString())


async def test_kafka_has_the_events_of_a_client_in_the_order_of_its_calls(
    bootstrap: str, log: Log
) -> None:
    """64 clients at the same time over 8 connections."""
    clients, publishes = [f"c{number}" for number in range(64)], 20
    async with serving(bootstrap, RULES) as provider:
        # Channels of one process share a connection if their options are alike.
        channels = [
            grpc.aio.insecure_channel(provider.address, options=[("connection", number)])
            for number in range(CONNECTIONS)
        ]
        async with asyncio.TaskGroup() as tasks:
            for number, client_id in enumerate(clients):
                tasks.create_task(live(channels[number % CONNECTIONS], client_id, publishes))
        for channel in channels:
            await channel.close()
    count = len(clients) * (2 + 3 * publishes)
    await log.until(lambda: len(log.records) >= count, "all events")
    assert len(log.records) == count
    for client_id in clients:
        filters = [f"f/{number}" for number in range(publishes)]
        events = [record.event for record in log.of_client(client_id)]
        assert isinstance(events[0], SessionCreated)
        assert isinstance(events[1], ClientConnected)
        found = [each.topic_filter for each in events if isinstance(each, SessionSubscribed)]
        assert found == filters
        for half in (0, 1):
            types = [
                (type(record.event), getattr(record.event, "message_id", None))
                for record in log.records
                if record.key == f"{client_id}/{half}"
            ]
            assert types == [
                (kind, f"{client_id}-{number}")
                for number in range(half, publishes, 2)
                for kind in (MessagePublished, MessageAcked)
            ]


async def test_the_report_of_a_copy_precedes_its_acknowledgement_in_the_partition(
    bootstrap: str, log: Log
) -> None:
    way = CopyTopic(SECRET).topic_for("queue/2/7", "c2", "m0", "mp/c2/queue/t")
    async with serving(bootstrap, RULES, MOUNTPOINT) as provider:
        answer = await provider.publish(a_publish(way, "ALIAS", from_client_id="http_api"))
        assert answer.message.topic == "mp/c2/queue/t"
        assert "allow_publish" not in answer.message.headers
        client, message = a_client(mountpoint="mp/c2/"), a_message("mp/c2/queue/t", "ALIAS")
        acked = pb.MessageAckedRequest(clientinfo=client, message=message)
        await provider.call("OnMessageAcked", acked)
        assert provider.heard.acks == [("c2", "ALIAS")]
    await log.until(lambda: len(log.records) == 2, "both")
    (sent,) = log.of_type(DeliveriesSent, "$millpond/queue")
    assert (sent.sent[0].alias, sent.sent[0].lease) == ("ALIAS", "queue/2/7")
    assert [r.partition for r in log.records if isinstance(r.event, DeliveriesSent)] == [2]
    assert [each.message_id for each in log.of_type(MessageAcked, "queue/t")] == ["ALIAS"]


# -- versions


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
async def test_every_call_is_served_under_its_name_in_each_version(version: Version) -> None:
    async with answering(InMemoryProducer(), RULES) as provider:
        for method in SERVICE.methods:
            await provider.call(method.name, b"", version)
        assert provider.hooks.answered.total() == len(SERVICE.methods)


async def test_another_version_is_not_served() -> None:
    async with answering(InMemoryProducer(), RULES) as provider:
        method = unary(provider.channel, "/emqx.exhook.v4.HookProvider/OnMessagePublish")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await method(b"")
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_calls_are_served_without_a_loaded_provider() -> None:
    durable_producer = InMemoryProducer()
    async with answering(durable_producer, RULES) as provider:
        answer = await provider.publish(a_publish("t"))
        assert answer.type == pb.ValuedResponse.IGNORE
        assert len(durable_producer.events) == 1


async def test_v3_has_publish_properties() -> None:
    durable_producer = InMemoryProducer()
    request = pb.MessagePublishRequest(
        message=a_message("t"),
        props=[pb.Property(name="Message-Expiry-Interval", value="60")],
        user_props=[pb.Property(name="a", value="b")],
    )
    async with answering(durable_producer, RULES) as provider:
        await provider.call("OnMessagePublish", request, "v3")
    (event,) = durable_producer.events
    assert isinstance(event, MessagePublished)
    assert event.user_properties == {"a": "b"}
    assert event.expires_at == event.published_at + 60_000


# -- health


async def health(provider: Provider, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    answer = await unary(provider.channel, "/grpc.health.v1.Health/Check")(request)
    return int(Status.FromString(answer).status)


async def test_health_follows_whether_events_are_stored() -> None:
    durable_producer = InMemoryProducer()
    async with answering(durable_producer, RULES) as provider:
        services = ["", *(service_name(version) for version in ("v1", "v2", "v3"))]
        for expected, complaint in (
            (Status.SERVING, None), (Status.NOT_SERVING, "the spool is full"), (Status.SERVING, None),
        ):  # fmt: skip
            durable_producer.complaint = complaint
            for service in services:

                async def reported(service: str = service, expected: int = expected) -> bool:
                    return await health(provider, service) == expected

                await until(reported, f"{service!r} to be {expected}")


async def test_publishes_are_refused_while_events_cannot_be_stored() -> None:
    durable_producer = InMemoryProducer()
    async with answering(durable_producer, RULES) as provider:
        durable_producer.complaint = "the spool is full"
        answer = await provider.publish(a_publish("queue/t"))
        assert answer.type == pb.ValuedResponse.STOP_AND_RETURN
        assert answer.message.headers["allow_publish"] == "false"
        created = pb.SessionCreatedRequest(clientinfo=a_client())
        assert await provider.call("OnSessionCreated", created) == b""


# -- TLS


def channel_credentials(
    root: Path, own: tuple[Path, Path] | None = None
) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(root.read_bytes())
    return grpc.ssl_channel_credentials(
        root.read_bytes(), private_key=own[1].read_bytes(), certificate_chain=own[0].read_bytes()
    )


async def loaded(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    """True if a client with these credentials gets an answer."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        try:
            await unary(channel, path("v2", "OnProviderLoaded"))(b"", timeout=10)
        except grpc.aio.AioRpcError as error:
            # A server that is about to end cancels what it does not take.
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            return False
        return True


async def test_with_a_certificate_the_server_accepts_tls_only(tmp_path: Path) -> None:
    files = certificate(tmp_path)
    settings = {"certificate_file": str(files.certificate), "key_file": str(files.key)}
    async with answering(InMemoryProducer(), RULES, settings=settings) as provider:
        assert await loaded(provider.address, channel_credentials(files.certificate))
        assert not await loaded(provider.address, None)


async def test_with_a_client_ca_the_server_accepts_only_its_certificates(tmp_path: Path) -> None:
    for name in ("server", "client", "stranger"):
        (tmp_path / name).mkdir()
    server, client, stranger = (
        certificate(tmp_path / name) for name in ("server", "client", "stranger")
    )
    settings = {
        "certificate_file": str(server.certificate), "key_file": str(server.key),
        "client_ca_file": str(client.certificate),
    }  # fmt: skip
    async with answering(InMemoryProducer(), RULES, settings=settings) as provider:
        root = server.certificate
        assert await loaded(provider.address, channel_credentials(root, client))
        assert not await loaded(provider.address, channel_credentials(root))
        assert not await loaded(provider.address, channel_credentials(root, stranger))
        assert provider.hooks.answered == {("OnProviderLoaded", "answered"): 1}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"certificate_file": "x"}, "needs both"),
        ({"key_file": "x"}, "needs both"),
        ({"client_ca_file": "x"}, "needs both"),
        ({"certificate_file": "absent", "key_file": "absent"}, "key_file: .*absent"),
        ({"exhook_listen": "203.0.113.1:9000"}, "cannot listen at 203.0.113.1:9000"),
        ({"exhook_listen": "127.0.0.1:65536"}, "no port 65536"),
    ],
)
async def test_wrong_settings_are_config_errors(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        async with answering(InMemoryProducer(), RULES, settings=settings):
            pass


# -- shared ports, and the stop


async def test_two_servers_share_a_port_and_a_connection_stays_with_one() -> None:
    listen, producers = f"{HOST}:{free_port()}", (InMemoryProducer(), InMemoryProducer())
    async with (
        answering(producers[0], RULES, settings={"exhook_listen": listen}),
        answering(producers[1], RULES, settings={"exhook_listen": listen}),
    ):
        for connection in range(32):
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            async with grpc.aio.insecure_channel(listen, options=options) as channel:
                for number in range(3):
                    request = a_publish("t", f"{connection}-{number}")
                    await unary(channel, path("v2", "OnMessagePublish"))(request)
    served = [
        {event.message_id.split("-")[0] for event in durable_producer.events if isinstance(event, MessagePublished)}
        for durable_producer in producers
    ]  # fmt: skip
    assert served[0]
    assert served[1]
    assert not served[0] & served[1]
    assert len(producers[0].events) + len(producers[1].events) == 96


async def test_running_calls_are_answered_before_the_server_stops() -> None:
    durable_producer = InMemoryProducer()
    durable_producer.paused = True
    async with answering(durable_producer, RULES) as provider:
        publishing = asyncio.create_task(provider.publish(a_publish("t")))

        async def entered() -> bool:
            return bool(durable_producer.futures)

        await until(entered, "the publish to be entered")
        stopping = asyncio.create_task(provider.server.stop(30))

        async def refused() -> bool:
            return not await loaded(provider.address, None)

        await until(refused, "new calls to be refused")
        assert not publishing.done()
        durable_producer.futures[0].set_result(None)
        assert (await publishing).type == pb.ValuedResponse.IGNORE
        await stopping


async def test_an_event_survives_the_cancellation_of_its_call() -> None:
    durable_producer = InMemoryProducer()
    durable_producer.paused = True
    async with answering(durable_producer, RULES) as provider:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await provider.method("OnMessagePublish")(a_publish("t"), timeout=0.2)
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED

        async def given_up() -> bool:
            return (await health(provider)) == Status.SERVING

        await until(given_up, "an answer")
        assert [future.cancelled() for future in durable_producer.futures] == [False]


async def test_thousands_of_calls_wait_while_the_bridge_is_busy() -> None:
    """By default gRPC cancels waiting calls beyond 1,000, and EMQX takes that for a success."""
    durable_producer = InMemoryProducer()
    async with answering(durable_producer, RULES) as provider:
        await provider.publish(a_publish("t", "first"))
        calls = [provider.publish(a_publish("t", f"m{number}")) for number in range(CROWD)]
        waiting = asyncio.gather(*calls)
        await asyncio.sleep(0)  # they are on their way
        time.sleep(1)
        assert {answer.type for answer in await waiting} == {pb.ValuedResponse.IGNORE}
    assert len(durable_producer.events) == CROWD + 1


# -- malformed requests


def damaged(request: bytes, chance: random.Random) -> bytes:
    """A request with flipped, cut or doubled bytes, or with random bytes instead."""
    match chance.randrange(4):
        case 0:
            return chance.randbytes(chance.randrange(200))
        case 1:
            return request[: chance.randrange(len(request) + 1)]
        case 2:
            return request + request[chance.randrange(len(request) + 1) :]
    changed = bytearray(request)
    for _ in range(chance.randrange(1, 6)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("mountpoint", [None, MOUNTPOINT], ids=["plain", "mounted"])
async def test_any_bytes_get_an_answer_or_a_counted_error(
    bootstrap: str, log: Log, mountpoint: Mountpoint | None
) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    requests: dict[str, list[bytes]] = {method.name: [b""] for method in SERVICE.methods}
    for call in trace():
        requests[call.name].append(call.request.SerializeToString())
    errors = 0
    async with serving(bootstrap, RULES, mountpoint) as provider:
        for name, known in requests.items():
            for _ in range(150):
                data = damaged(chance.choice(known), chance)
                try:
                    await provider.method(name)(data, timeout=30)
                except grpc.aio.AioRpcError as error:
                    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (name, data)
                    errors += 1
        assert (
            errors
            == sum(
                count
                for (_, outcome), count in provider.hooks.answered.items()
                if outcome == "malformed"
            )
            > 0
        )
        assert provider.calls.refusals.counts["malformed"] == errors
        assert provider.calls.refusals.counts["invalid"] > 0
        await provider.publish(a_publish("the/end"))
    # The log decodes all that was written.
    await log.until(lambda: log.published("the/end"), "the server to serve on")


async def test_a_request_beyond_the_limit_fails_and_the_next_one_succeeds() -> None:
    async with answering(InMemoryProducer(), RULES) as provider:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await provider.publish(a_publish("t", payload=bytes(33 * 1024 * 1024)))
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await provider.publish(a_publish("t"))).type == pb.ValuedResponse.IGNORE
