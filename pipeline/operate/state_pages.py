"""A table of an agent's states, read page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator

from millpond.agents.effects import Table
from millpond.agents.reads import ReadAllStates
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas.keys import Partition


async def pages(
    reader: StoreReader, partition: Partition, table: Table = "states"
) -> AsyncIterator[dict[str, bytes]]:
    """Read a table of one partition, some hundred packed states at a time.

    The agent may change the table meanwhile. A state that is added or deleted may be missing or appear twice.
    """
    cursor = -1  # not begun; Redis answers 0 with the last page
    while cursor:
        ((cursor, states),) = await reader.read(partition, [ReadAllStates(max(cursor, 0), table)])
        if states:
            yield states
