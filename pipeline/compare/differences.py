"""A replayed database compared with the live one, key by key and field by field, while live goes on.

Everything is looked at once; what differs then may only be what live has done since. So it is read from live once more,
together with the applied offsets of that very moment, the replay goes on up to exactly these, and only what differs
then is a difference. As long as that is much, the replay catches up and what has become the same is left out first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
import orjson
from hiredis import ReplyError

from millpond.agents.ports import Applied
from millpond.pipeline.compare.owned_keys import OwnedKeys, without_batches
from millpond.pipeline.stores.redis.connection import RedisCommand
from millpond.pipeline.stores.redis.keyspace import Keyspace
from millpond.schemas import keys
from millpond.schemas.errors import MillpondError
from millpond.schemas.keys import Partition

WHOLE_MAX: Final = 500  # fields of a key that is compared in one piece
LOOKED_AT_AGAIN: Final = 1_000  # fields in one question
SIFTINGS_MAX: Final = 5  # looks at what live has changed since the one before
SUSPECTS_MAX: Final = 100_000  # that are looked at again; beyond, something is wrong altogether
FENCE_SUFFIX: Final = keys.applied(Partition("", "messages", 0)).rpartition(":")[2].encode()

ItemKind: TypeAlias = Literal["string", "hash", "zset", "lifetime"]
NextOffsets: TypeAlias = Mapping[Partition, int]  # the one after the applied


class ComparedItem(NamedTuple):
    """What is compared: a string, one field or member of a key, or whether a key has a lifetime."""

    kind: ItemKind
    key: bytes
    field: bytes


class Difference(NamedTuple):
    """What live has and what the replay has; None is nothing."""

    item: ComparedItem
    live: bytes | None
    replayed: bytes | None

    @property
    def what(self) -> Literal["added", "missing", "changed"]:
        """Seen from live: the replay has it too much, has it not, or has something else."""
        if self.live is None:
            return "added"
        return "missing" if self.replayed is None else "changed"


class Comparison(NamedTuple):
    """What came of it: how many keys live has, what differs, and whether there is more that was not looked at again."""

    keys: int
    differences: list[Difference]
    more: bool


class Comparing:
    """One comparison; `go_on` folds the partitions up to these offsets."""

    def __init__(
        self,
        live: Keyspace,
        replayed: Keyspace,
        partitions: Sequence[Partition],
        cluster_id: str,
        go_on: Callable[[NextOffsets], Awaitable[None]],
    ) -> None:
        """All partitions whose keys are compared."""
        self._live, self._replayed = live, replayed
        self._partitions, self._cluster_id, self._go_on = partitions, cluster_id, go_on
        self._fences: list[RedisCommand] = [("GET", keys.applied(each)) for each in partitions]

    async def run(self, owned: OwnedKeys) -> Comparison:
        """Compare all that is owned."""
        await self._catch_up()
        count, suspects = await self._look(owned)
        more = len(suspects) > SUSPECTS_MAX
        for _ in range(SIFTINGS_MAX):
            if len(suspects) <= LOOKED_AT_AGAIN:
                break
            await self._catch_up()
            suspects = [each for some in _in_parts(suspects) for each in await self._sift(some)]
        differences: list[Difference] = []
        for some in _in_parts(suspects):
            commands = [_command(item) for item in some]
            told = await self._live.at_once([*self._fences, *commands])
            await self._fold_to(told[: len(self._fences)])
            mine, theirs = told[len(self._fences) :], await self._replayed.ask(commands)
            differences += _unequal(some, mine, theirs)
        return Comparison(count, differences, more)

    async def _catch_up(self) -> None:
        """Fold what live has folded by now."""
        await self._fold_to(await self._live.ask(self._fences))

    async def _fold_to(self, fences: Sequence[Any]) -> None:
        found = _offsets(self._partitions, fences, self._live, self._cluster_id)
        await self._go_on(found)

    async def _look(self, owned: OwnedKeys) -> tuple[int, list[ComparedItem]]:
        """How many keys live has, and what is not the same at a first look."""
        suspects: dict[ComparedItem, None] = {}
        count = 0
        for one, other, both_ways in (
            (self._live, self._replayed, True),
            (self._replayed, self._live, False),
        ):
            async for page in owned.scan(one):
                count += len(page) if both_ways else 0
                async for found in _suspects(page, one, other, both_ways=both_ways):
                    suspects.update(dict.fromkeys(found))
                if len(suspects) > SUSPECTS_MAX:
                    return count, list(suspects)
        return count, list(suspects)

    async def _sift(self, items: Sequence[ComparedItem]) -> list[ComparedItem]:
        """Those that are still not the same."""
        commands = [_command(item) for item in items]
        mine, theirs = await self._live.ask(commands), await self._replayed.ask(commands)
        return [each.item for each in _unequal(items, mine, theirs)]


def _in_parts(items: Sequence[ComparedItem]) -> Iterable[Sequence[ComparedItem]]:
    return (items[at : at + LOOKED_AT_AGAIN] for at in range(0, len(items), LOOKED_AT_AGAIN))


async def offsets(
    live: Keyspace, partitions: Sequence[Partition], cluster_id: str
) -> dict[Partition, int]:
    """The next offset of each partition that live has folded anything of.

    Raises:
        MillpondError: its state is of another Kafka cluster.
    """
    fences = await live.ask([("GET", keys.applied(each)) for each in partitions])
    return _offsets(partitions, fences, live, cluster_id)


def _offsets(
    partitions: Sequence[Partition], fences: Sequence[Any], live: Keyspace, cluster_id: str
) -> dict[Partition, int]:
    found: dict[Partition, int] = {}
    for partition, fence in zip(partitions, fences, strict=True):
        if fence is None:
            continue
        try:
            applied = msgspec.json.decode(fence, type=Applied)
        except msgspec.DecodeError as error:
            raise MillpondError(
                f"{live.where} holds no applied offset in {keys.applied(partition)}: {error}"
            ) from error
        if applied.cluster_id != cluster_id:
            raise MillpondError(
                f"{live.where} holds the state of {partition} of Kafka cluster {applied.cluster_id},"
                f" but this is cluster {cluster_id}"
            )
        found[partition] = applied.offset + 1
    return found


# -- the first look -----------------------------------------------------------------------------------------


async def _suspects(
    page: Sequence[bytes], one: Keyspace, other: Keyspace, *, both_ways: bool
) -> AsyncIterator[list[ComparedItem]]:
    """What of these keys of one database is not the same in the other one. Unless `both_ways`, the other one's own have
    been looked at.
    """
    kinds = await one.ask([("TYPE", key) for key in page])
    others = await other.ask([("TYPE", key) for key in page])
    whole: list[tuple[bytes, bytes]] = []
    sizes = await one.ask(
        [_SIZE.get(kind, _EXISTS)(key) for kind, key in zip(kinds, page, strict=True)]
    )
    for key, kind, other_kind, size in zip(page, kinds, others, sizes, strict=True):
        if kind in _SIZE and isinstance(size, int) and size > WHOLE_MAX:
            async for found in _piece_by_piece(key, kind, one, other):
                yield found
        elif both_ways or other_kind != kind:
            whole.append((key, kind))
    yield await _in_one_piece(whole, one, other)


def _exists(key: bytes) -> RedisCommand:
    return ("EXISTS", key)


_EXISTS: Final = _exists
_SIZE: Final[dict[bytes, Callable[[bytes], RedisCommand]]] = {
    b"hash": lambda key: ("HLEN", key),
    b"zset": lambda key: ("ZCARD", key),
}
_WHOLE: Final[dict[bytes, Callable[[bytes], RedisCommand]]] = {
    b"hash": lambda key: ("HGETALL", key),
    b"zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
    b"string": lambda key: ("GET", key),
}


async def _in_one_piece(
    whole: Sequence[tuple[bytes, bytes]], one: Keyspace, other: Keyspace
) -> list[ComparedItem]:
    known = [(key, kind) for key, kind in whole if kind in _WHOLE]
    commands: list[RedisCommand] = []
    for key, kind in known:
        commands += [_WHOLE[kind](key), ("PTTL", key)]
    if not commands:
        return []
    mine, theirs = await one.ask(commands), await other.ask(commands)
    found: list[ComparedItem] = []
    for at, (key, kind) in enumerate(known):
        here, there = mine[2 * at], theirs[2 * at]
        if kind == b"string":
            item = ComparedItem("string", key, b"")
            if _shown(item, here) != _shown(item, there):
                found.append(item)
        elif here != there:
            found += _fields(key, kind, here, there)
        lifetime = ComparedItem("lifetime", key, b"")
        if _shown(lifetime, mine[2 * at + 1]) != _shown(lifetime, theirs[2 * at + 1]):
            found.append(lifetime)
    return found


def _fields(key: bytes, kind: bytes, here: Any, there: Any) -> Iterable[ComparedItem]:
    mine, theirs = _pairs(here), _pairs(there)
    named: ItemKind = "hash" if kind == b"hash" else "zset"
    for field in {**mine, **theirs}:
        if mine.get(field) != theirs.get(field):
            yield ComparedItem(named, key, field)


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """A hash, or a zset, as it was told; nothing if the key is of another type."""
    if isinstance(reply, ReplyError) or reply is None:
        return {}
    return dict(zip(reply[::2], reply[1::2], strict=True))


async def _piece_by_piece(
    key: bytes, kind: bytes, one: Keyspace, other: Keyspace
) -> AsyncIterator[list[ComparedItem]]:
    named: ItemKind = "hash" if kind == b"hash" else "zset"
    scan, cursor = ("HSCAN" if kind == b"hash" else "ZSCAN"), b"0"
    while True:
        cursor, told = await one.get(scan, key, cursor, "COUNT", WHOLE_MAX)
        mine = _pairs(told)
        items = [ComparedItem(named, key, field) for field in mine]
        theirs = await other.ask([_command(item) for item in items]) if items else []
        yield [
            item
            for item, (field, value), reply in zip(items, mine.items(), theirs, strict=True)
            if _shown(item, value) != _shown(item, reply)
        ]
        if cursor == b"0":
            return


# -- the second look ----------------------------------------------------------------------------------------


def _unequal(
    items: Sequence[ComparedItem], mine: Sequence[Any], theirs: Sequence[Any]
) -> Iterable[Difference]:
    for item, live, replayed in zip(items, mine, theirs, strict=True):
        found = Difference(item, _shown(item, live), _shown(item, replayed))
        if found.live != found.replayed:
            yield found


def _command(item: ComparedItem) -> RedisCommand:
    match item.kind:
        case "string":
            return ("GET", item.key)
        case "hash":
            return ("HGET", item.key, item.field)
        case "zset":
            return ("ZSCORE", item.key, item.field)
        case _:
            return ("PTTL", item.key)


def _shown(item: ComparedItem, reply: Any) -> bytes | None:
    """A value as it is compared: a fence without what depends on batches; of a lifetime only whether there is one, since
    the servers' clocks count it.
    """
    if isinstance(reply, ReplyError):
        return str(reply).encode()
    if item.kind == "lifetime":
        return {-2: None, -1: b"for ever"}.get(reply, b"for a time")
    if item.kind == "string" and reply is not None and item.key.rpartition(b":")[2] == FENCE_SUFFIX:
        try:
            return orjson.dumps(without_batches(orjson.loads(reply)))
        except (ValueError, AttributeError):
            return bytes(reply)
    return None if reply is None else bytes(reply)
