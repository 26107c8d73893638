"""The database that a replay folds into, and the marker that says what a replay has put there.

The marker is one hash for each agent. Its `complete` is 0 from the claim on, and 1 after the replay.

**ON claim**

1. Without a marker, the database must have no keys of the agent.
2. An interrupted replay is continued, if the Kafka cluster and `--from` are the same. It keeps its starts, although
   Kafka may have deleted records since.
3. A complete replay is refused.
4. Write the marker.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct, structs

from millpond.pipeline.compare.owned_keys import OwnedKeys
from millpond.pipeline.stores.redis.keyspace import Keyspace, keyspace
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError, StoreDown
from millpond.schemas.events import AgentName
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool


class Marker(Struct, frozen=True, kw_only=True):
    """A replay of one agent. `begins` is the `--from` of its command; `starts` and `ends` are offsets by partition.

    An end is exclusive.
    """

    cluster_id: str
    begins: str
    starts: dict[int, int]
    ends: dict[int, int]
    complete: bool = False


async def read_marker(space: Keyspace, app: str, agent: AgentName) -> Marker | None:
    """Return the marker of a database, or None.

    Raises:
        MillpondError: its key does not hold a marker.
    """
    name = keys.replay_marker(app, agent)
    pairs = await space.call("HGETALL", name)
    fields = dict(zip((part.decode() for part in pairs[::2]), pairs[1::2], strict=True))
    if not fields:
        return None
    try:
        return Marker(
            cluster_id=fields["cluster_id"].decode(),
            begins=fields["from"].decode(),
            starts=msgspec.json.decode(fields["starts"], type=dict[int, int]),
            ends=msgspec.json.decode(fields["ends"], type=dict[int, int]),
            complete=fields["complete"] == b"1",
        )
    except (KeyError, ValueError) as error:
        raise MillpondError(
            f"{space.where} holds a key {name} that no replay wrote: {error!r};"
            " empty the database, or choose another"
        ) from error


async def write_marker(space: Keyspace, app: str, agent: AgentName, marker: Marker) -> None:
    """Write the marker of a database, or replace it."""
    fields = {
        "complete": int(marker.complete),
        "from": marker.begins,
        "starts": msgspec.json.encode(marker.starts),
        "ends": msgspec.json.encode(marker.ends),
        "cluster_id": marker.cluster_id,
    }
    parts = [part for pair in fields.items() for part in pair]
    await space.call("HSET", keys.replay_marker(app, agent), *parts)


async def claim(
    space: Keyspace, app: str, agent: AgentName, rules: Rules, wanted: Marker
) -> Marker:
    """Mark the database as an incomplete replay of the agent, and return the marker that counts.

    Raises:
        MillpondError: the database has other keys of the agent, or another replay.
    """
    known = await read_marker(space, app, agent)
    if known is None:
        await _check_empty(space, app, agent, rules)
    else:
        _check_same(space, agent, known, wanted)
        wanted = structs.replace(wanted, starts=known.starts)
    await write_marker(space, app, agent, wanted)
    return wanted


def _check_same(space: Keyspace, agent: AgentName, known: Marker, wanted: Marker) -> None:
    found = f"{space.where} holds a replay of {agent}"
    if known.complete:
        raise MillpondError(f"{found} that is complete: empty the database, or choose another")
    if known.cluster_id != wanted.cluster_id:
        raise MillpondError(
            f"{found} of Kafka cluster {known.cluster_id}: empty the database, or choose another"
        )
    if known.begins != wanted.begins:
        raise MillpondError(
            f"{found} that was interrupted, from {known.begins}: continue it with --from {known.begins},"
            " or empty the database"
        )


async def _check_empty(space: Keyspace, app: str, agent: AgentName, rules: Rules) -> None:
    prefix = keys.private_prefix(app, agent)
    # Not only `OwnedKeys`: it leaves out journals.
    async for page in space.scan(prefix):
        raise MillpondError(_not_empty(space, agent, page))
    async for page in OwnedKeys(app, [agent], rules).scan(space):
        raise MillpondError(_not_empty(space, agent, page))


def _not_empty(space: Keyspace, agent: AgentName, page: Sequence[bytes]) -> str:
    key = page[0].decode("utf-8", "backslashreplace")
    return (
        f"{space.where} holds keys of {agent} that no replay has put there, such as {key}:"
        " empty the database, or choose another"
    )


async def check_not_live(space: Keyspace, into: Pool, live: Sequence[Pool], app: str) -> None:
    """Check that a database is none of the live ones.

    A value written to one and read from the other tells, so that a second address of the same server is noticed. Of a
    live server that is down the address counts alone.

    Raises:
        MillpondError: it is one of them.
    """
    for pool in live:
        # A cluster names several servers, and has one database.
        same = into.servers[0] in pool.servers and into.database == pool.database
        if pool.type != "cluster" and not same:
            try:
                async with keyspace(pool) as other:
                    same = await space.is_same_database(other, app)
            except StoreDown:
                same = False
        if same:
            raise MillpondError(
                f"{space.where} database {into.database} is the live store (pool {pool.name}):"
                " replay into another database or server"
            )
