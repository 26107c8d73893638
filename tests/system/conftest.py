"""What the tests of bridges share; each module of the embedded broker's has a `bridge` of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from millpond.pipeline.brokers.emqx.rest.client import RestClient
from tests.support.embedded_bridge import Bridge, Log, reading
from tests.support.emqx.broker import Emqx
from tests.support.emqx.rest import EmqxRest, serving
from tests.support.emqx.scene import asking


@pytest.fixture
async def log(bridge: Bridge) -> AsyncIterator[Log]:
    """What the bridge writes to Kafka during a test."""
    async with reading(bridge.bootstrap) as log:
        yield log


@pytest.fixture
async def let_go(bridge: Bridge) -> AsyncIterator[None]:
    """Whoever is still connected after a test goes."""
    yield
    bridge.let_go()


@pytest.fixture
async def server() -> AsyncIterator[EmqxRest]:
    """REST of an EMQX without hooks."""
    emqx = Emqx()
    async with serving(emqx) as server:
        yield server
    emqx.stop()


@pytest.fixture
async def rest(server: EmqxRest, tmp_path: Path) -> AsyncIterator[RestClient]:
    """Who asks it, as a bridge does."""
    async with asking(server, tmp_path) as rest:
        yield rest
