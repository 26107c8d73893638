"""The HTTP listener: what it answers to whom, and where it listens."""

from __future__ import annotations

import socket
from typing import Any

import aiohttp
import pytest

from millpond.pipeline.telemetry.bridge import HookMetrics
from millpond.pipeline.telemetry.http import Listener, serving
from millpond.schemas.errors import ConfigError


class Health:
    """As it is told to be."""

    def __init__(self, dead: list[str], waiting: list[str]) -> None:
        self._dead, self._waiting = dead, waiting

    async def not_alive(self) -> list[str]:
        return self._dead

    async def not_ready(self) -> list[str]:
        return self._waiting


WELL = Health([], [])


def port_of(caplog: pytest.LogCaptureFixture) -> int:
    return int(caplog.messages[-1].rpartition(":")[2])


async def asked(port: int, path: str, **headers: str) -> tuple[int, str, str]:
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
async def test_health_says_why_not(
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


async def test_metrics_are_in_the_form_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hooks = HookMetrics({})
    hooks.observe("message.publish", 0.01, "kept")
    async with serving("127.0.0.1:0", "bridge emqx", [hooks], WELL):
        port = port_of(caplog)
        status, kind, text = await asked(port, "/metrics")
        assert (status, kind) == (200, "text/plain")
        assert 'millpond_bridge_hook_calls_total{hook="message.publish",outcome="kept"} 1.0' in text
        openmetrics = "application/openmetrics-text"
        _, kind, text = await asked(port, "/metrics", Accept=f"{openmetrics};version=1.0.0")
        assert kind == openmetrics
        assert text.endswith("# EOF\n")
        assert (await asked(port, "/"))[0] == 404


async def test_nobody_listens_unless_told_to(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving(None, "worker queue", [], WELL):
        assert caplog.messages == []


async def test_an_address_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^\[telemetry\] listen: {port}: .*in use"):
            async with serving(str(port), "worker queue", [], WELL):
                pass


def test_a_listener_has_three_paths() -> None:
    paths = {
        route.resource.canonical
        for route in Listener("p", [], WELL).app().router.routes()
        if route.resource
    }
    assert paths == {"/metrics", "/healthz", "/readyz"}
