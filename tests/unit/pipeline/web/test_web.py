"""The parts of the web page that need no server: shared lookups, rates, the token, and the files that it serves."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path

import pytest

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.operate.lag import AgentLag, PartitionLag
from millpond.pipeline.web import lookups, server
from millpond.pipeline.web.lookups import Rates, SharedLookup, SharedLookups
from millpond.pipeline.web.operator_token import OperatorToken
from millpond.schemas.errors import ConfigError, StoreDown

TOKEN = "a-token-that-is-long-enough"
OWN = sorted(path for path in server.PAGE.iterdir() if path.is_file())


def lag(*applied: int | None) -> list[AgentLag]:
    """An agent with these applied offsets, one for each partition."""
    partitions = tuple(
        PartitionLag(agent="queue", partition=at, start=0, end=99, committed=0, applied=offset)
        for at, offset in enumerate(applied)
    )
    return [AgentLag(agent="queue", partitions=partitions)]


def rate(*seen: tuple[float, list[AgentLag]]) -> float | None:
    rates = Rates()
    for at, found in seen:
        rates.note(at, found)
    return rates.of("queue")


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], None),
        ([(0, lag(5, 5))], None),
        ([(0, lag(5, 5)), (2, lag(5, 5))], 0),
        ([(0, lag(5, 5)), (2, lag(9, 7))], 3),
        ([(0, lag(5, None)), (2, lag(9, 1_000))], 2),  # partition 1 had no state before
        ([(0, lag(5, 50)), (2, lag(9, 0))], 2),  # rebuilt
        ([(0, lag(0)), (1, lag(100)), (10, lag(100)), (12, lag(100))], 0),  # long ago
        ([(0, lag(0)), (3_600, lag(3_600))], None),  # no request for an hour
        ([(0, lag(0)), (30, lag(60))], 2),  # each lookup takes long
        ([(7, lag(0)), (7, lag(60))], None),
    ],
)
def test_a_rate_is_that_of_the_last_seconds(
    seen: list[tuple[float, list[AgentLag]]], expected: float | None
) -> None:
    assert rate(*seen) == expected
    assert Rates().of(AGENT_NAMES[0]) is None


async def test_requests_at_the_same_time_share_one_lookup_and_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[int] = []
    go = asyncio.Event()

    async def lookup() -> int:
        runs.append(1)
        await go.wait()
        if len(runs) == 1:
            raise StoreDown("down")
        return len(runs)

    monkeypatch.setattr(lookups, "FRESH_S", 0.0)
    shared = SharedLookup(lookup)
    asking = [asyncio.create_task(shared.get()) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()  # a closed connection must not cancel the lookup of the others
    go.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in answers] == [asyncio.CancelledError, StoreDown, StoreDown]
    assert await shared.get() == 2
    monkeypatch.setattr(lookups, "FRESH_S", 60.0)
    await asyncio.sleep(0.01)
    assert await shared.get() == await shared.get() == 3


async def test_only_the_names_used_last_are_remembered() -> None:
    runs: list[str] = []

    async def lookup(name: str) -> str:
        runs.append(name)
        return name

    shared = SharedLookups(lookup)
    names = [str(number) for number in range(lookups.REMEMBERED_MAX + 1)]
    assert [await shared.get(name) for name in names] == names
    await shared.get(names[-1])
    assert runs == names
    await shared.get(names[0])
    assert runs == [*names, names[0]]


def test_only_the_token_that_the_file_has_now_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\nsomething else\n")
    operator = OperatorToken(str(file))
    assert operator.is_valid(f"Bearer {TOKEN}")
    for other in ("", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}\n", "Bearer é\udcff"):
        assert not operator.is_valid(other)
    file.write_text(TOKEN.upper())
    assert operator.is_valid(f"Bearer {TOKEN.upper()}")
    assert not operator.is_valid(f"Bearer {TOKEN}")
    none = OperatorToken(None)
    assert not none.configured
    assert not none.is_valid("Bearer ")


@pytest.mark.parametrize("text", ["", "\n", "short", "é" * 20, " " * 40])
def test_a_token_that_is_short_or_not_ascii_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match="token_file"):
        OperatorToken(str(file))


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_the_page_is_small_and_has_no_address_of_another_site(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert re.findall(r"//[a-z0-9.-]+\.[a-z]{2,}", text.replace("//www.w3.org/2000/svg", "")) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []


def test_the_server_serves_every_file_of_the_page() -> None:
    assert {server.PAGE / name for name, _ in server.FILES.values()} == {
        *OWN, server.PAGE / "vendor" / "mqtt.min.js",
    }  # fmt: skip


def test_mqtt_js_has_the_digest_in_its_readme() -> None:
    vendor = server.PAGE / "vendor"
    digest = hashlib.sha256((vendor / "mqtt.min.js").read_bytes()).hexdigest()
    assert f"SHA-256 `{digest}`" in (vendor / "README.md").read_text()
    assert "MIT License" in (vendor / "LICENSE.md").read_text()
