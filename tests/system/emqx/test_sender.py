"""The sender carries out commands through REST: order, windows, and every outcome of a publish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from millpond.pipeline.brokers.emqx.delivery.windows import WINDOW
from millpond.pipeline.brokers.emqx.rest import client as rest_module
from tests.support.emqx.broker import ORDINARY, Client
from tests.support.emqx.rest import SECRET
from tests.support.emqx.scene import Provider, Scene, playing
from tests.support.workers import until


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with playing(tmp_path) as scene:
        yield scene


async def a_subscriber(scene: Scene, client_id: str = "c", **how: Any) -> Client:
    client = await scene.emqx.connect(client_id, **how)
    await client.subscribe("queue/#")
    return client


def numbers(client: Client) -> list[int]:
    return [int(payload) for payload in client.payloads]


def many(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


async def test_a_copy_reaches_one_client_alone_under_the_message_topic(scene: Scene) -> None:
    client = await a_subscriber(scene)
    other = await a_subscriber(scene, "other")
    await scene.deliver("c", 1)
    (copy,) = await client.until_received(1)
    assert (copy.topic, copy.payload, copy.qos, copy.retain) == ("queue/a", b"1", 1, False)
    await scene.until_done(1)
    assert other.received == []
    assert scene.sent == []  # the hook reports it
    (asked,) = scene.server.bulks[0]
    assert asked["topic"].startswith("$millpond/d/")
    assert asked["topic"].endswith("/mp/c/queue/a")
    assert 58 <= asked["properties"]["message_expiry_interval"] <= 60


async def test_a_payload_may_be_any_bytes(scene: Scene) -> None:
    client = await a_subscriber(scene)
    await scene.deliver("c", 1, payload="/wA=", payload_encoding="base64")
    await scene.deliver("c", 2, payload="é")
    await client.until_received(2)
    assert client.payloads == [b"\xff\x00", "é".encode()]


async def test_a_qos_0_copy_is_reported_as_sent_after_the_answer_of_rest(scene: Scene) -> None:
    client = await a_subscriber(scene)
    await scene.deliver("c", 1, qos=0)
    await scene.until_done(1)
    assert scene.sent == ["m1"]
    assert numbers(client) == [1]


async def test_revoked_commands_are_neither_sent_nor_reported(scene: Scene) -> None:
    """Another process has the partition now. What EMQX has is finished, what waits for room is left to that process."""
    client = await a_subscriber(scene, answers=False)
    await scene.deliver("c", *range(WINDOW + 50))
    await scene.until_done(*range(WINDOW))
    scene.revoked = True
    await scene.sender.settle()
    await client.disconnect()  # the session ends: what waited would fail
    scene.revoked = False
    other = await a_subscriber(scene, "other")
    await scene.deliver("other", WINDOW + 50)
    await other.until_received(1)
    await scene.until_done(*range(WINDOW), WINDOW + 50)
    assert sum(len(bulk) for bulk in scene.server.bulks) == WINDOW + 1
    assert scene.failed("no_client") == []


async def test_a_copy_without_a_lease_is_not_reported(scene: Scene) -> None:
    client = await a_subscriber(scene)
    await scene.deliver("c", 1, lease="", retain=True)
    await scene.until_done(1)
    (copy,) = await client.until_received(1)
    assert not copy.retain
    assert scene.emqx.retained == {}
    assert scene.event_producer.events == []


async def test_each_client_gets_its_copies_in_order(scene: Scene) -> None:
    clients = [await a_subscriber(scene, f"c{number}") for number in range(20)]
    for number in range(60):
        for client in clients:
            await scene.deliver(client.client_id, number)
    for client in clients:
        await client.until_received(60)
        assert numbers(client) == list(range(60))


async def test_requests_run_concurrently(scene: Scene) -> None:
    one, other = await a_subscriber(scene, "one"), await a_subscriber(scene, "other")
    fault = scene.server.fault("/publish", "hang", times=1)
    await scene.deliver("one", 1)

    async def under_way() -> bool:
        return fault.seen == 1

    await until(under_way, "a request that hangs")
    await scene.deliver("other", 2)
    await scene.until_done(2)
    scene.server.heal()
    await scene.until_done(1, 2)
    assert numbers(one) == [1]
    assert numbers(other) == [2]


async def test_emqx_holds_at_most_a_window_for_a_client_that_acknowledges_nothing(
    scene: Scene,
) -> None:
    slow = await a_subscriber(scene, "slow", answers=False)
    quick = await a_subscriber(scene, "quick")
    await scene.deliver("slow", *range(WINDOW + 50))
    await scene.deliver("quick", *range(1_000, 1_200))
    await quick.until_received(200)
    await scene.emqx.until_held("slow", WINDOW)
    assert scene.emqx.held("slow") == WINDOW
    for copy in list(slow.received):
        await slow.ack(copy)
    slow.answers = True
    for copy in list(slow.received[32:]):
        await slow.ack(copy)
    await slow.until_received(WINDOW + 50)
    assert numbers(slow) == list(range(WINDOW + 50))
    assert scene.emqx.sessions["slow"].dropped == 0


async def test_a_copy_that_waits_too_long_is_stale_and_expired_copies_free_room(
    scene: Scene,
) -> None:
    await a_subscriber(scene, answers=False)
    await scene.deliver("c", *range(WINDOW), valid_for_s=1.5)
    await scene.emqx.until_held("c", WINDOW)
    await scene.deliver("c", 900, valid_for_s=0.5)
    await scene.deliver("c", 901, epoch=2, valid_for_s=60)
    await scene.until_done(*range(WINDOW), 900, 901)
    assert scene.failed("stale") == ["m900"]


async def test_without_a_subscriber_a_copy_fails_and_later_ones_of_its_epoch_are_stale(
    scene: Scene,
) -> None:
    await scene.deliver("gone", 1)
    await scene.until_done(1)
    await scene.deliver("gone", 2)
    await scene.deliver("gone", 3, epoch=2)
    await scene.until_done(1, 2, 3)
    assert scene.failed("no_client") == ["m1", "m3"]
    assert scene.failed("stale") == ["m2"]


async def test_each_copy_of_a_bulk_has_its_own_outcome(scene: Scene) -> None:
    client = await a_subscriber(scene)
    fault = scene.server.fault("/publish", 429, times=1)
    for number in range(5):
        await scene.deliver("c" if number % 2 else f"gone{number}", number)
    await scene.until_done(*range(5))
    assert fault.seen == 1
    assert numbers(client) == [1, 3]
    assert sorted(scene.failed("no_client")) == ["m0", "m2", "m4"]


async def test_a_copy_that_was_not_handed_over_is_repeated(scene: Scene) -> None:
    client = await a_subscriber(scene)
    scene.server.undelivered.add(b"2")
    await scene.deliver("c", 1, 2)

    async def tried() -> bool:
        return len(scene.server.bulks) >= 3

    await until(tried, "some attempts")
    scene.server.undelivered.clear()
    await scene.until_done(1, 2)
    assert numbers(client) == [1, 2]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 429])
async def test_a_rejected_publish_is_repeated_in_order(
    scene: Scene, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    client = await a_subscriber(scene)
    fault = scene.server.fault("/publish", status)
    await scene.deliver("c", *range(10))

    async def refused() -> bool:
        return fault.seen >= 3

    await until(refused, "three attempts")
    assert scene.done == []
    await scene.deliver("c", *range(10, 20))
    scene.server.heal()
    await scene.until_done(*range(20))
    assert numbers(client) == list(range(20))
    assert f"answers {status}" in caplog.text
    assert SECRET not in caplog.text
    if status in (401, 403):
        assert "api_key_file" in caplog.text
    assert "EMQX accepts requests again" in caplog.text


@pytest.mark.parametrize("kind", [500, 502, 503, "cut"])
async def test_an_unanswered_publish_is_repeated(scene: Scene, kind: Any) -> None:
    client = await a_subscriber(scene)
    fault = scene.server.fault("/publish", kind, times=3)
    await scene.deliver("c", *range(30))
    await scene.until_done(*range(30))
    assert fault.seen == 3
    assert numbers(client) == list(range(30))


async def test_a_garbage_answer_counts_as_unanswered(scene: Scene) -> None:
    client = await a_subscriber(scene)
    scene.server.fault("/publish", 200, times=2, body=b'[{"id":7}]')
    await scene.deliver("c", 1)
    await scene.until_done(1)
    assert numbers(client) == [1]


async def test_copies_with_a_lost_answer_are_repeated_before_later_ones(scene: Scene) -> None:
    client = await a_subscriber(scene)
    fault = scene.server.fault("/publish", "lost", times=1)
    await scene.deliver("c", 1, 2)

    async def lost() -> bool:
        return fault.seen == 1

    await until(lost, "a lost answer")
    await scene.deliver("c", 3)
    await scene.until_done(1, 2, 3)
    await client.until_received(5)
    assert numbers(client) == [1, 2, 1, 2, 3]


async def test_lost_answers_never_fill_a_client_beyond_its_window(scene: Scene) -> None:
    await a_subscriber(scene, answers=False)
    fault = scene.server.fault("/publish", "lost")
    await scene.deliver("c", *range(WINDOW))

    async def lost() -> bool:
        return fault.seen >= 5

    await until(lost, "five lost answers")
    assert scene.emqx.held("c") <= WINDOW


async def test_a_qos_0_copy_without_a_lease_is_not_repeated(scene: Scene) -> None:
    client = await a_subscriber(scene)
    scene.server.fault("/publish", "lost", times=1)
    await scene.deliver("c", 1, lease="", qos=0)
    await scene.until_done(1)
    assert numbers(client) == [1]


async def test_a_publish_that_times_out_is_repeated(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_module, "PUBLISH_TIMEOUT_S", 0.3)
    client = await a_subscriber(scene)
    scene.server.fault("/publish", "hang", times=1)
    await scene.deliver("c", 1, 2)
    await scene.until_done(1, 2)
    assert numbers(client) == [1, 2]


async def test_copies_wait_until_emqx_is_back(scene: Scene) -> None:
    client = await a_subscriber(scene)
    await scene.deliver("c", 1)
    await scene.until_done(1)
    await scene.server.stop()
    await scene.deliver("c", *range(2, 40))
    await asyncio.sleep(0.5)
    assert scene.done == [1]
    await scene.server.start()
    await scene.until_done(*range(1, 40))
    assert numbers(client) == list(range(1, 40))


async def test_commands_become_stale_while_emqx_is_away(scene: Scene) -> None:
    await scene.server.stop()
    began = time.monotonic()
    await scene.deliver("c", 1, 2, valid_for_s=1)
    await scene.until_done(1, 2)
    assert scene.failed("stale") == ["m1", "m2"]
    assert 1 <= time.monotonic() - began < 10


async def test_only_the_refused_copy_of_a_bulk_fails(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    client = await a_subscriber(scene)
    fault = scene.server.fault("/publish", 429, times=1)
    await scene.deliver("c", 0, 1, 2)
    await scene.deliver("bad", 3, topic="queue/#")
    await scene.deliver("c", 4)
    await scene.until_done(0, 1, 2, 3, 4)
    assert fault.seen == 1
    assert numbers(client) == [0, 1, 2, 4]
    assert scene.failed("bridge") == ["m3"]
    assert "bad: EMQX refuses a copy, it fails" in caplog.text


async def test_a_client_with_an_ambiguous_id_gets_nothing(scene: Scene) -> None:
    await scene.deliver("a/b", 1)
    await scene.until_done(1)
    assert scene.failed("bridge") == ["m1"]
    assert scene.server.bulks == []


async def test_without_a_mountpoint_stored_messages_reach_all_subscribers(tmp_path: Path) -> None:
    async with playing(tmp_path, mounted=False) as scene:
        client = await scene.emqx.connect("c", listener=ORDINARY)
        await client.subscribe("queue/a")
        await scene.deliver("c", 1)
        await scene.deliver("c", 2, lease="", retain=True)
        await scene.until_done(1, 2)
        assert numbers(client) == [1]


async def test_the_end_of_a_session_fails_its_waiting_commands(scene: Scene) -> None:
    client = await a_subscriber(scene, answers=False)
    await scene.deliver("c", *range(WINDOW + 3))
    await scene.emqx.until_held("c", WINDOW)
    await scene.subscribe("c", "other", number=800)
    await client.disconnect()
    await scene.until_done(*range(WINDOW + 3), 800)
    assert scene.failed("no_client") == [f"m{WINDOW + number}" for number in range(3)]


async def test_subscription_changes_keep_their_place_among_copies(scene: Scene) -> None:
    client = await scene.emqx.connect("c")
    await scene.subscribe("c", "queue/#", "$share/g/s", number=1)
    await scene.deliver("c", 2)
    await scene.unsubscribe("c", "queue/#", number=3)
    await scene.deliver("c", 4)
    await scene.until_done(1, 2, 3, 4)
    assert numbers(client) == [2]
    assert scene.failed("no_client") == ["m4"]
    assert list(scene.emqx.sessions["c"].subscriptions) == ["$share/g/mp/c/s"]


async def test_a_change_for_a_client_without_a_session_is_done(scene: Scene) -> None:
    await scene.subscribe("nobody", "a", number=1)
    await scene.unsubscribe("nobody", "a", number=2)
    await scene.until_done(1, 2)


@pytest.mark.parametrize("kind", [401, 404, 429, 500, 503, "cut", "lost"])
async def test_a_failed_change_is_repeated(scene: Scene, kind: Any) -> None:
    await scene.emqx.connect("c")
    fault = scene.server.fault("/clients", kind, times=2)
    await scene.subscribe("c", "a", number=1)
    await scene.until_done(1)
    assert fault.seen == 2
    assert list(scene.emqx.sessions["c"].subscriptions) == ["mp/c/a"]


async def test_a_refused_change_is_logged_and_dropped(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.server.fault("/clients", 400, times=1, body=b'{"code":"INVALID_PARAMETER"}')
    await scene.subscribe("c", "a", number=1)
    await scene.until_done(1)
    assert "c: EMQX refuses a change of subscriptions" in caplog.text
    assert "EMQX answers 400: INVALID_PARAMETER" in caplog.text


async def test_a_stale_change_is_not_carried_out(scene: Scene) -> None:
    await scene.emqx.connect("c")
    await scene.server.stop()
    await scene.subscribe("c", "a", number=1, valid_for_s=0.3)
    await scene.until_done(1)
    assert scene.emqx.sessions["c"].subscriptions == {}


async def test_subscriptions_that_are_not_granted_are_logged(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.server.fault("/clients", 200, times=1, body=b'{"succeed":[],"failed":[{"data":[]}]}')
    await scene.subscribe("c", "a", "b", number=1)
    await scene.until_done(1)
    assert "EMQX does not grant 1 of 2 subscriptions" in caplog.text


async def test_finish_waits_for_running_requests_and_starts_no_more(scene: Scene) -> None:
    client = await a_subscriber(scene)
    fault = scene.server.fault("/publish", "hang", times=1)
    await scene.deliver("c", 1)

    async def under_way() -> bool:
        return fault.seen == 1

    await until(under_way, "a request that hangs")
    finishing = asyncio.create_task(scene.sender.finish())
    await scene.deliver("c", 2)
    scene.server.heal()
    await finishing
    # The request was cut off. The next process would repeat it.
    assert client.received == []
    assert len(scene.server.bulks) == 0


async def test_many_copies_a_second(scene: Scene) -> None:
    clients = [await a_subscriber(scene, f"c{number}") for number in range(50)]
    for number in range(40):
        for client in clients:
            await scene.deliver(client.client_id, number)
    for client in clients:
        await client.until_received(40)
    assert len(scene.server.bulks) < 50 * 40 / 10
    assert isinstance(scene.emqx.hooks, Provider)
    assert len(scene.emqx.hooks.returned) == 2_000
