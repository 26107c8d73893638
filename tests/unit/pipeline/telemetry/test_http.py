"""The HTTP listener: its address, its three paths and their answers."""

from __future__ import annotations

import socket
from typing import Any

import aiohttp
import pytest

from millpond.pipeline.telemetry.bridge import HookMetrics
from millpond.pipeline.telemetry.http import Listener, serving
from millpond.schemas.errors import ConfigError


class Health:
    """A health that the test chooses."""

    def __init__(self, dead: list[str], waiting: list[str]) -> None:
        self._dead, self._waiting = dead, waiting

    async def not_alive(self) -> list[str]:
        return self._dead

    async def not_ready(self) -> list[str]:
        return self._waiting


HEALTHY = Health([], [])


def port_of(caplog: pytest.LogCaptureFixture) -> int:
    return int(caplog.messages[-1].rpartition(":")[2])


async def request(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    url = f"http://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, answer.content_type, await answer.text()


@pytest.mark.parametrize(
    ("dead", "waiting", "healthz", "readyz"),
    [
        ([], [], (200, []), (200, [])),
        ([], ["no store"], (200, []), (503, ["no store"])),
        (["it stops"], ["no store"], (503, ["it stops"]), (503, ["it stops", "no store"])),
    ],
)
async def test_an_unhealthy_process_answers_with_its_reasons(
    caplog: pytest.LogCaptureFixture, dead: list[str], waiting: list[str],
    healthz: tuple[int, list[str]], readyz: tuple[int, list[str]],
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    async with serving("0", "worker queue", [], Health(dead, waiting)):
        for path, (status, reasons) in (("/healthz", healthz), ("/readyz", readyz)):
            url = f"http://127.0.0.1:{port_of(caplog)}{path}"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                said: Any = await answer.json()
                assert answer.status == status
            assert said == {"process": "worker queue", "ok": not reasons, "reasons": reasons}


async def test_metrics_have_the_format_that_the_request_accepts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    hooks = HookMetrics({})
    hooks.observe("message.publish", 0.01, "kept")
    async with serving("127.0.0.1:0", "bridge emqx", [hooks], HEALTHY):
        port = port_of(caplog)
        status, kind, text = await request(port, "/metrics")
        assert (status, kind) == (200, "text/plain")
        assert 'millpond_bridge_hook_calls_total{hook="message.publish",outcome="kept"} 1.0' in text
        openmetrics = "application/openmetrics-text"
        _, kind, text = await request(port, "/metrics", Accept=f"{openmetrics};version=1.0.0")
        assert kind == openmetrics
        assert text.endswith("# EOF\n")
        assert (await request(port, "/"))[0] == 404


async def test_without_an_address_nothing_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving(None, "worker queue", [], HEALTHY):
        assert caplog.messages == []


async def test_an_address_in_use_is_an_error_of_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^\[telemetry\] listen: {port}: .*in use"):
            async with serving(str(port), "worker queue", [], HEALTHY):
                pass


def test_a_listener_has_three_paths() -> None:
    paths = {
        route.resource.canonical
        for route in Listener("p", [], HEALTHY).app().router.routes()
        if route.resource
    }
    assert paths == {"/metrics", "/healthz", "/readyz"}


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:1", 200), ("evil.example", 403), ("evil.example:9000", 403)],
)
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
async def test_on_loopback_no_other_host_name_is_answered(
    caplog: pytest.LogCaptureFixture, path: str, host: str, status: int
) -> None:
    caplog.set_level("INFO")
    async with serving("0", "p", [], HEALTHY):
        assert (await request(port_of(caplog), path, Host=host))[0] == status
