"""What the page needs besides its servers: shared looks, rates, the token, and that nothing comes from elsewhere."""

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
    """An agent whose partitions are so far."""
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
        ([(0, lag(5, None)), (2, lag(9, 1_000))], 2),  # first seen: not applied just now
        ([(0, lag(5, 50)), (2, lag(9, 0))], 2),  # rebuilt
        ([(0, lag(0)), (1, lag(100)), (10, lag(100)), (12, lag(100))], 0),  # long ago
        ([(0, lag(0)), (3_600, lag(3_600))], None),  # nobody has looked for an hour
        ([(0, lag(0)), (30, lag(60))], 2),  # each look takes long
        ([(7, lag(0)), (7, lag(60))], None),
    ],
)
def test_a_rate_is_of_the_last_seconds(
    seen: list[tuple[float, list[AgentLag]]], expected: float | None
) -> None:
    assert rate(*seen) == expected
    assert Rates().of(AGENT_NAMES[0]) is None


async def test_all_who_ask_share_one_look_and_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    go = asyncio.Event()

    async def look() -> int:
        looked.append(1)
        await go.wait()
        if len(looked) == 1:
            raise StoreDown("away")
        return len(looked)

    monkeypatch.setattr(lookups, "FRESH_S", 0.0)
    shared = SharedLookup(look)
    asking = [asyncio.create_task(shared.get()) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()  # who goes away takes nobody's answer along
    go.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in answers] == [asyncio.CancelledError, StoreDown, StoreDown]
    assert await shared.get() == 2
    monkeypatch.setattr(lookups, "FRESH_S", 60.0)
    await asyncio.sleep(0.01)
    assert await shared.get() == await shared.get() == 3


async def test_only_so_many_names_are_remembered() -> None:
    looked: list[str] = []

    async def look(name: str) -> str:
        looked.append(name)
        return name

    shared = SharedLookups(look)
    names = [str(number) for number in range(lookups.REMEMBERED_MAX + 1)]
    assert [await shared.get(name) for name in names] == names
    await shared.get(names[-1])
    assert looked == names
    await shared.get(names[0])
    assert looked == [*names, names[0]]


def test_the_operator_is_who_has_the_token_that_is_in_the_file_now(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\nsomething else\n")
    operator = OperatorToken(str(file))
    assert operator.is_meant(f"Bearer {TOKEN}")
    for other in ("", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}\n", "Bearer é\udcff"):
        assert not operator.is_meant(other)
    file.write_text(TOKEN.upper())
    assert operator.is_meant(f"Bearer {TOKEN.upper()}")
    assert not operator.is_meant(f"Bearer {TOKEN}")
    nobody = OperatorToken(None)
    assert not nobody.possible
    assert not nobody.is_meant("Bearer ")


@pytest.mark.parametrize("text", ["", "\n", "short", "é" * 20, " " * 40])
def test_a_token_that_could_be_guessed_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match="token_file"):
        OperatorToken(str(file))


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_the_page_is_small_and_names_nothing_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert re.findall(r"//[a-z0-9.-]+\.[a-z]{2,}", text.replace("//www.w3.org/2000/svg", "")) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []


def test_all_that_the_page_loads_is_there() -> None:
    assert {server.PAGE / name for name, _ in server.FILES.values()} == {
        *OWN, server.PAGE / "vendor" / "mqtt.min.js",
    }  # fmt: skip


def test_mqtt_js_is_the_one_that_is_named_beside_it() -> None:
    vendor = server.PAGE / "vendor"
    digest = hashlib.sha256((vendor / "mqtt.min.js").read_bytes()).hexdigest()
    assert f"SHA-256 `{digest}`" in (vendor / "README.md").read_text()
    assert "MIT License" in (vendor / "LICENSE.md").read_text()
