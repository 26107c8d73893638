"""The database that a replay folds into: empty of the agent's keys, or with an interrupted replay of the same."""

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
    """What a replay has put, or is putting, into a database: by partition the first offset and the one after the last."""

    cluster_id: str
    begins: str
    starts: dict[int, int]
    ends: dict[int, int]
    complete: bool = False


async def read_marker(space: Keyspace, app: str, agent: AgentName) -> Marker | None:
    """What is marked; None if nothing is.

    Raises:
        MillpondError: the key holds something else.
    """
    name = keys.replay_marker(app, agent)
    pairs = await space.get("HGETALL", name)
    held = dict(zip((part.decode() for part in pairs[::2]), pairs[1::2], strict=True))
    if not held:
        return None
    try:
        return Marker(
            cluster_id=held["cluster_id"].decode(),
            begins=held["from"].decode(),
            starts=msgspec.json.decode(held["starts"], type=dict[int, int]),
            ends=msgspec.json.decode(held["ends"], type=dict[int, int]),
            complete=held["complete"] == b"1",
        )
    except (KeyError, ValueError) as error:
        raise MillpondError(
            f"{space.where} holds a key {name} that no replay wrote: {error!r}"
        ) from error


async def write_marker(space: Keyspace, app: str, agent: AgentName, marker: Marker) -> None:
    """Mark it, whatever was marked before."""
    fields = {
        "complete": int(marker.complete),
        "from": marker.begins,
        "starts": msgspec.json.encode(marker.starts),
        "ends": msgspec.json.encode(marker.ends),
        "cluster_id": marker.cluster_id,
    }
    parts = [part for pair in fields.items() for part in pair]
    await space.get("HSET", keys.replay_marker(app, agent), *parts)


async def claim(
    space: Keyspace, app: str, agent: AgentName, rules: Rules, wanted: Marker
) -> Marker:
    """Mark the database as holding an incomplete replay of the agent; an interrupted one's own beginning holds.

    Raises:
        MillpondError: it holds something else of the agent, or another replay.
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
    held = f"{space.where} holds a replay of {agent}"
    if known.complete:
        raise MillpondError(f"{held} that is complete: empty the database, or choose another")
    if known.cluster_id != wanted.cluster_id:
        raise MillpondError(
            f"{held} of Kafka cluster {known.cluster_id}: empty the database, or choose another"
        )
    if known.begins != wanted.begins:
        raise MillpondError(
            f"{held} that was interrupted, from {known.begins}: go on with --from {known.begins}, or empty the database"
        )


async def _check_empty(space: Keyspace, app: str, agent: AgentName, rules: Rules) -> None:
    prefix = keys.private_prefix(app, agent)
    async for page in space.scan(prefix):
        raise MillpondError(_not_empty(space, agent, page))
    async for page in OwnedKeys(app, [agent], rules).scan(space):
        raise MillpondError(_not_empty(space, agent, page))


def _not_empty(space: Keyspace, agent: AgentName, page: Sequence[bytes]) -> str:
    key = page[0].decode("utf-8", "backslashreplace")
    return (
        f"{space.where} holds keys of {agent} that no replay has put there, such as {key}:"
        " a replay needs a database without them"
    )


async def check_not_live(space: Keyspace, into: Pool, live: Sequence[Pool]) -> None:
    """Whether a database is another one than these, by the servers' own identity. One that is away cannot be written to
    by its workers either, and is told by its address.

    Raises:
        MillpondError: it is one of them.
    """
    target = await space.identity()
    for pool in live:
        same = (into.servers[0], into.database) == (pool.servers[0], pool.database)
        if pool.type != "cluster" and not same:
            try:
                async with keyspace(pool) as other:
                    same = await other.identity() == target
            except StoreDown:
                same = False
        if same:
            raise MillpondError(
                f"{space.where} database {into.database} is the live store (pool {pool.name}): replay into another one"
            )
