"""What the tests of the embedded broker's bridge share; each module has a `bridge` of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.system.bridge import Bridge, Log, reading


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
