"""The client of EMQX's REST API against every documented answer, and against undocumented ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from millpond.pipeline.brokers.emqx.rest import client as rest_module
from millpond.pipeline.brokers.emqx.rest.client import (
    REQUEST_FAULTS,
    PublishRequest,
    Refused,
    RestClient,
    RestError,
    Unanswered,
    Unauthorized,
    Unreachable,
)
from millpond.pipeline.brokers.emqx.rest.responses import PublishResult
from millpond.pipeline.settings import BridgeSettings
from millpond.schemas.errors import ConfigError
from tests.support.emqx.broker import MOUNTED, NODE, ORDINARY
from tests.support.emqx.rest import SECRET, EmqxRest
from tests.support.emqx.scene import asking, settings_for
from tests.support.tls import certificate, tls_front


def a_message(topic: str = "t", payload: str = "aGk=", qos: int = 1) -> PublishRequest:
    return PublishRequest(topic, payload, qos, {"message_expiry_interval": 60})


async def test_a_bulk_has_a_result_for_each_message(server: EmqxRest, rest: RestClient) -> None:
    client = await server.emqx.connect("c", listener=ORDINARY)
    await client.subscribe("t")
    server.undelivered.add(b"lost")
    results = await rest.publish([a_message(), a_message("nobody"), a_message(payload="bG9zdA==")])
    (copy,) = await client.until_received(1)
    assert copy.payload == b"hi"
    assert results == [
        PublishResult(id=copy.id),
        PublishResult(reason_code=16, message="no_matching_subscribers"),
        PublishResult(reason_code=131, message="failed_to_dispatch"),
    ]


async def test_one_refused_message_fails_the_whole_bulk(server: EmqxRest, rest: RestClient) -> None:
    client = await server.emqx.connect("c", listener=ORDINARY)
    await client.subscribe("t")
    with pytest.raises(Refused, match="400: 144 topic_name_invalid") as caught:
        await rest.publish([a_message(), a_message("t/#")])
    assert caught.value.status == 400
    assert client.received == []


async def test_subscriptions_are_changed_with_the_filters_of_the_client(
    server: EmqxRest, rest: RestClient
) -> None:
    client = await server.emqx.connect("c", listener=MOUNTED)
    assert await rest.subscribe("c", [("queue/a", 1), ("$share/g/b/#", 2)]) is not None
    held = server.emqx.sessions["c"].subscriptions
    assert {name: options["qos"] for name, options in held.items()} == {
        "mp/c/queue/a": 1, "$share/g/mp/c/b/#": 2,
    }  # fmt: skip
    assert await rest.unsubscribe("c", ["queue/a"])
    assert list(held) == ["$share/g/mp/c/b/#"]
    await client.settle()


async def test_a_client_without_a_session_cannot_be_subscribed(rest: RestClient) -> None:
    assert await rest.subscribe("nobody", [("a", 1)]) is None
    assert not await rest.unsubscribe("nobody", ["a"])


async def test_any_client_id_is_one_level_of_a_path(server: EmqxRest, rest: RestClient) -> None:
    name = "a/b+c%2F d?é#"
    await server.emqx.connect(name, listener=ORDINARY)
    assert await rest.subscribe(name, [("a", 1)]) is not None
    assert list(server.emqx.sessions[name].subscriptions) == ["a"]


@pytest.mark.parametrize("name", [".", ".."])
async def test_a_name_that_no_path_can_have_is_refused_without_a_request(
    server: EmqxRest, rest: RestClient, name: str
) -> None:
    for request in (
        rest.subscribe(name, [("a", 1)]),
        rest.unsubscribe(name, ["a"]),
        rest.retained(name),
    ):
        with pytest.raises(Refused, match="no path for the name") as caught:
            await request
        assert caught.value.status in REQUEST_FAULTS
    assert server.asked == []


async def test_the_address_may_end_with_the_path_of_the_api(
    server: EmqxRest, tmp_path: Path
) -> None:
    for ending in ("/", "/api/v5", "/api/v5/"):
        settings = settings_for(server, tmp_path, url=f"{server.url}{ending}")
        rest = RestClient(settings)
        await rest.start()
        assert await rest.nodes()
        await rest.stop()


async def test_subscriptions_that_emqx_does_not_grant_are_returned(
    server: EmqxRest, rest: RestClient
) -> None:
    server.fault("/clients", 200, body=b'{"succeed":[],"failed":[{"data":["c"],"reason":"x"}]}')
    granted = await rest.subscribe("c", [("a", 1)])
    assert granted is not None
    assert len(granted.failed) == 1


async def test_lists_are_read_page_by_page(
    server: EmqxRest, rest: RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_module, "PAGE_ROWS", 2)
    for number in range(5):
        client = await server.emqx.connect(f"c{number}", listener=ORDINARY, expiry_s=7)
        await client.subscribe("t", qos=2)
    pages = [page async for page in rest.clients()]
    assert [[row.clientid for row in page] for page in pages] == [
        ["c0", "c1"],
        ["c2", "c3"],
        ["c4"],
    ]
    row = pages[0][0]
    assert (row.node, row.connected, row.mountpoint, row.expiry_interval) == (NODE, True, None, 7)
    held = [row async for page in rest.subscriptions() for row in page]
    assert [(row.clientid, row.topic, row.qos) for row in held] == [
        (f"c{number}", "t", 2) for number in range(5)
    ]


async def test_an_unreadable_row_is_skipped(server: EmqxRest, rest: RestClient) -> None:
    good = b'{"clientid":"c","connected":false,"username":null}'
    body = (
        b'{"data":[{"clientid":"a\\u0000b","connected":true},%s],"meta":{"hasnext":false}}' % good
    )
    server.fault("/clients", 200, body=body)
    assert [[row.clientid for row in page] async for page in rest.clients()] == [["c"]]


async def test_a_page_without_a_readable_row_counts_as_unanswered(
    server: EmqxRest, rest: RestClient
) -> None:
    server.fault("/clients", 200, body=b'{"data":[{"id":"c"}],"meta":{"hasnext":false}}')
    with pytest.raises(Unanswered, match="no row of EMQX's /clients can be read"):
        [page async for page in rest.clients()]


async def test_nodes_and_whether_they_run(server: EmqxRest, rest: RestClient) -> None:
    server.emqx.nodes["emqx@10.0.0.2"] = "stopped"
    assert [(node.node, node.running) for node in await rest.nodes()] == [
        (NODE, True), ("emqx@10.0.0.2", False),
    ]  # fmt: skip


async def test_retained_messages_are_read(server: EmqxRest, rest: RestClient) -> None:
    client = await server.emqx.connect("c", listener=ORDINARY, username="u")
    await client.publish("a/b c+é".replace("+", "-"), b"\xff\x00", retain=True)
    found = await rest.retained("a/b c-é")
    assert found is not None
    assert (found.payload, found.from_clientid, found.from_username) == ("/wA=", "c", "u")
    assert await rest.retained("other") is None


def several(rest: RestClient) -> list[tuple[str, Any]]:
    return [
        ("publish", lambda: rest.publish([a_message()])),
        ("subscribe", lambda: rest.subscribe("c", [("a", 1)])),
        ("unsubscribe", lambda: rest.unsubscribe("c", ["a"])),
        ("nodes", rest.nodes),
        ("clients", lambda: anext(rest.clients())),
        ("subscriptions", lambda: anext(rest.subscriptions())),
        ("retained", lambda: rest.retained("t")),
    ]


ODD: list[tuple[Any, bytes, type[RestError]]] = [
    (401, b'{"code":"BAD_API_KEY_OR_SECRET"}', Unauthorized),
    (403, b'{"code":"API_KEY_NOT_ALLOW"}', Unauthorized),
    (404, b"<html>no such page</html>", Refused),
    (429, b"", Refused),
    (500, b'{"code":"INTERNAL_ERROR","message":"oh"}', Unanswered),
    (502, b"<html>", Unanswered),
    (503, b'{"code":"SERVICE_UNAVAILABLE"}', Unanswered),
    (504, b"", Unanswered),
    (301, b"", Refused),
    (200, b"garbage", Unanswered),
    (200, b'{"a": ' + b"[" * 5_000, Unanswered),
    (200, b"\xff\xfe", Unanswered),
    ("cut", b"", Unanswered),
]


@pytest.mark.parametrize("kind,body,error", ODD)
async def test_every_other_answer_is_an_error_of_its_type(
    server: EmqxRest, rest: RestClient, kind: Any, body: bytes, error: type[RestError],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    server.fault("/", kind, body=body)
    for what, call in several(rest):
        if what == "unsubscribe" and kind == 200:
            continue  # its answer has no body to read
        with pytest.raises(error) as caught:
            await call()
        assert type(caught.value) is error, what
        seen = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__dict__}"
        assert SECRET not in seen
    assert SECRET not in caplog.text
    assert "Basic " not in caplog.text


async def test_a_missing_answer_times_out(
    server: EmqxRest, rest: RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_module, "PUBLISH_TIMEOUT_S", 0.2)
    server.fault("/publish", "hang")
    with pytest.raises(Unanswered, match="no answer: timed out"):
        await rest.publish([a_message()])


async def test_without_a_connection_the_error_names_the_setting(
    server: EmqxRest, rest: RestClient
) -> None:
    await server.stop()
    with pytest.raises(Unreachable, match=rf"\[bridge\] rest_url {server.url}: .*"):
        await rest.publish([a_message()])


async def test_the_size_of_an_answer_is_limited(
    server: EmqxRest, rest: RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_module, "ANSWER_BYTES_MAX", 1_000)
    server.fault("/nodes", 200, body=b"x" * 2_000)
    with pytest.raises(Unanswered):
        await rest.nodes()


async def test_a_wrong_number_of_results_counts_as_unanswered(
    server: EmqxRest, rest: RestClient
) -> None:
    server.fault("/publish", 200, body=b'[{"id":"A"}]')
    with pytest.raises(Unanswered, match="1 results of 2"):
        await rest.publish([a_message(), a_message()])


async def test_a_changed_key_file_is_read_again(
    server: EmqxRest, rest: RestClient, tmp_path: Path
) -> None:
    server.key = "other:secret"
    with pytest.raises(Unauthorized, match="api_key_file"):
        await rest.nodes()
    (tmp_path / "api-key").write_text("other:secret\n")
    assert await rest.nodes()


async def test_a_missing_key_file_is_named(
    server: EmqxRest, rest: RestClient, tmp_path: Path
) -> None:
    server.key = "other:secret"
    (tmp_path / "api-key").unlink()
    for _ in range(2):
        with pytest.raises(Unauthorized, match="api_key_file"):
            await rest.nodes()


async def test_a_failed_read_is_retried(server: EmqxRest, rest: RestClient) -> None:
    fault = server.fault("/nodes", 500, times=2)
    assert await rest.nodes()
    assert fault.seen == 2


async def test_wrong_settings_fail_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key_file is missing"):
        RestClient(BridgeSettings())
    with pytest.raises(ConfigError, match="api_key_file: cannot read"):
        await RestClient(BridgeSettings(api_key_file=str(tmp_path / "none"))).start()
    (tmp_path / "key").write_text("no colon\n")
    with pytest.raises(ConfigError, match="does not hold one line key:secret") as caught:
        await RestClient(BridgeSettings(api_key_file=str(tmp_path / "key"))).start()
    assert "no colon" not in str(caught.value)
    (tmp_path / "key").write_text("a:b\n")
    wrong = BridgeSettings(
        rest_url="https://127.0.0.1:1", api_key_file=str(tmp_path / "key"), rest_ca_file="/none"
    )
    with pytest.raises(ConfigError, match="rest_ca_file"):
        await RestClient(wrong).start()


async def test_no_message_holds_the_key(server: EmqxRest, tmp_path: Path) -> None:
    async with asking(server, tmp_path) as rest:
        assert repr(rest) == f"Rest('{server.url}')"
    assert settings_for(server, tmp_path).api_key_file == str(tmp_path / "api-key")


async def test_over_tls_the_certificate_is_verified(server: EmqxRest, tmp_path: Path) -> None:
    files = certificate(tmp_path)
    async with tls_front(files, server.port) as port:
        url = f"https://127.0.0.1:{port}"
        async with asking(server, tmp_path, url=url, rest_ca_file=str(files.certificate)) as rest:
            assert await rest.nodes()
    async with tls_front(files, server.port) as port:
        key_file = settings_for(server, tmp_path).api_key_file
        rest = RestClient(
            BridgeSettings(rest_url=f"https://127.0.0.1:{port}", api_key_file=key_file)
        )
        await rest.start()
        with pytest.raises(Unreachable, match="certificate verify failed"):
            await rest.nodes()
        await rest.stop()
