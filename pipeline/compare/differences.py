"""A replayed database compared with the live one, key by key and field by field, while the live one changes.

**Concepts**

- An *item* is the unit of comparison: a string, a field of a hash, a member of a sorted set, or the lifetime of a key.
- A *suspect* is an item that differed when it was last read. The live database may have changed since the replay's end.
- A *difference* is a suspect that also differs at one common log position of both databases.

**Steps**

1. Catch up: read the applied offsets of the live database, and continue the replay to them.
2. Find suspects: compare every owned key, first those of the live database, then those of the replayed one alone.
3. While many suspects are left: catch up, and drop those that are equal now.
4. For each part of the rest: read the items and all fences of the live database in one transaction. Continue the replay
   to exactly these offsets. Read the items of the replayed database. What differs now is a difference.

Step 4 is exact, because the values and the applied offsets are of one moment. It is slow, so step 3 reduces its work.

**What is equal**

- The fence is compared without the fields that depend on where batches end (`owned_keys.BATCH_FIELDS`).
- Of a lifetime only its existence is compared, because each server counts it by its own clock.
- A key of another type, or an error of the server, is compared as the text of the error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from hiredis import ReplyError

from millpond.pipeline.compare.owned_keys import OwnedKeys, without_batch_fields
from millpond.pipeline.stores.redis.connection import RedisCommand
from millpond.pipeline.stores.redis.keyspace import Keyspace
from millpond.schemas import keys
from millpond.schemas.keys import Partition

FIELDS_AT_ONCE: Final = 500  # a larger hash or sorted set is read in pages of about this size
ITEMS_AT_ONCE: Final = 1_000  # suspects in one round trip
ROUNDS_MAX: Final = 5  # of step 3
SUSPECTS_MAX: Final = 100_000  # bounds memory; with more, the databases have little in common
FENCE_SUFFIX: Final = keys.applied(Partition("", "messages", 0)).rpartition(":")[2].encode()

ItemKind: TypeAlias = Literal["string", "hash", "zset", "lifetime"]
NextOffsets: TypeAlias = Mapping[Partition, int]  # the applied offset + 1


class ComparedItem(NamedTuple):
    """An item. `field` is a field or member, and empty for strings and lifetimes."""

    kind: ItemKind
    key: bytes
    field: bytes


class Difference(NamedTuple):
    """An item with its two values. None: that database does not have the item."""

    item: ComparedItem
    live: bytes | None
    replayed: bytes | None

    @property
    def what(self) -> Literal["added", "missing", "changed"]:
        """What the replay did to the item, seen from the live database."""
        if self.live is None:
            return "added"
        return "missing" if self.replayed is None else "changed"


class Comparison(NamedTuple):
    """The result: the number of keys in the live database, and the differences.

    `more`: there were too many suspects, so the search ended early. Both numbers are then too small.
    """

    keys: int
    differences: list[Difference]
    more: bool


class Comparer:
    """One comparison of a live and a replayed database. `continue_to` continues the replay to some offsets."""

    def __init__(
        self,
        live: Keyspace,
        replayed: Keyspace,
        partitions: Sequence[Partition],
        cluster_id: str,
        continue_to: Callable[[NextOffsets], Awaitable[None]],
    ) -> None:
        """`partitions` are all partitions whose keys are compared."""
        self._live, self._replayed = live, replayed
        self._partitions, self._cluster_id, self._continue_to = partitions, cluster_id, continue_to
        self._fences: list[RedisCommand] = [("GET", keys.applied(each)) for each in partitions]

    async def run(self, owned: OwnedKeys) -> Comparison:
        """Compare all owned keys.

        Raises:
            MillpondError: a fence of the live database cannot be read, or is of another Kafka cluster.
        """
        await self._catch_up()
        count, suspects = await self._find_suspects(owned)
        more = len(suspects) > SUSPECTS_MAX
        for _ in range(ROUNDS_MAX):
            if len(suspects) <= ITEMS_AT_ONCE:
                break
            await self._catch_up()
            suspects = [each for part in _parts(suspects) for each in await self._unequal_now(part)]
        differences: list[Difference] = []
        for part in _parts(suspects):
            commands = [_read_command(item) for item in part]
            replies = await self._live.run_atomically([*self._fences, *commands])
            await self._fold_to(replies[: len(self._fences)])
            live, replayed = replies[len(self._fences) :], await self._replayed.run(commands)
            differences += _unequal(part, live, replayed)
        return Comparison(count, differences, more)

    async def _catch_up(self) -> None:
        await self._fold_to(await self._live.run(self._fences))

    async def _fold_to(self, fences: Sequence[Any]) -> None:
        offsets = _decode_offsets(self._partitions, fences, self._live, self._cluster_id)
        await self._continue_to(offsets)

    async def _find_suspects(self, owned: OwnedKeys) -> tuple[int, list[ComparedItem]]:
        """Return the number of keys in the live database, and all suspects. Stop early if there are too many."""
        suspects: dict[ComparedItem, None] = {}
        count = 0
        for scanned, other, compare_common in (
            (self._live, self._replayed, True),
            # Keys of both databases were compared in the first pass.
            (self._replayed, self._live, False),
        ):
            async for page in owned.scan(scanned):
                count += len(page) if compare_common else 0
                async for found in _suspects(page, scanned, other, compare_common=compare_common):
                    suspects.update(dict.fromkeys(found))
                if len(suspects) > SUSPECTS_MAX:
                    return count, list(suspects)
        return count, list(suspects)

    async def _unequal_now(self, items: Sequence[ComparedItem]) -> list[ComparedItem]:
        commands = [_read_command(item) for item in items]
        live, replayed = await self._live.run(commands), await self._replayed.run(commands)
        return [each.item for each in _unequal(items, live, replayed)]


def _parts(items: Sequence[ComparedItem]) -> Iterable[Sequence[ComparedItem]]:
    return (items[at : at + ITEMS_AT_ONCE] for at in range(0, len(items), ITEMS_AT_ONCE))


async def next_offsets(
    live: Keyspace, partitions: Sequence[Partition], cluster_id: str
) -> dict[Partition, int]:
    """Return the offset behind the applied one, for each partition that has state.

    Raises:
        MillpondError: a fence cannot be read, or is of another Kafka cluster.
    """
    fences = await live.run([("GET", keys.applied(each)) for each in partitions])
    return _decode_offsets(partitions, fences, live, cluster_id)


def _decode_offsets(
    partitions: Sequence[Partition], fences: Sequence[Any], live: Keyspace, cluster_id: str
) -> dict[Partition, int]:
    offsets: dict[Partition, int] = {}
    for partition, reply in zip(partitions, fences, strict=True):
        if reply is not None:
            fence = live.decode_fence(partition, reply)
            live.check_cluster(partition, fence, cluster_id)
            offsets[partition] = fence.offset + 1
    return offsets


# -- step 2: suspects ---------------------------------------------------------------------------------------


async def _suspects(
    page: Sequence[bytes], scanned: Keyspace, other: Keyspace, *, compare_common: bool
) -> AsyncIterator[list[ComparedItem]]:
    """Compare keys of the scanned database with the other one.

    Without `compare_common`, keys that the other database has with the same type are skipped.
    """
    kinds = await scanned.run([("TYPE", key) for key in page])
    other_kinds = await other.run([("TYPE", key) for key in page])
    small: list[tuple[bytes, bytes]] = []
    sizes = await scanned.run(
        [_SIZE.get(kind, _exists)(key) for kind, key in zip(kinds, page, strict=True)]
    )
    for key, kind, other_kind, size in zip(page, kinds, other_kinds, sizes, strict=True):
        # `size` is an error if the key's type has changed since the first command.
        if kind in _SIZE and isinstance(size, int) and size > FIELDS_AT_ONCE:
            # Also without `compare_common`: only this pass finds fields that the replay added to a large key.
            async for found in _suspects_of_large(key, kind, scanned, other):
                yield found
        elif compare_common or other_kind != kind:
            small.append((key, kind))
    yield await _suspects_of_small(small, scanned, other)


def _exists(key: bytes) -> RedisCommand:
    return ("EXISTS", key)


_SIZE: Final[dict[bytes, Callable[[bytes], RedisCommand]]] = {
    b"hash": lambda key: ("HLEN", key),
    b"zset": lambda key: ("ZCARD", key),
}
_READ_ALL: Final[dict[bytes, Callable[[bytes], RedisCommand]]] = {
    b"hash": lambda key: ("HGETALL", key),
    b"zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
    b"string": lambda key: ("GET", key),
}


async def _suspects_of_small(
    small: Sequence[tuple[bytes, bytes]], scanned: Keyspace, other: Keyspace
) -> list[ComparedItem]:
    """Compare keys that are read as a whole, and their lifetimes."""
    # Millpond writes no other types. If the other database has a key of these types there, its own pass compares it.
    known = [(key, kind) for key, kind in small if kind in _READ_ALL]
    commands: list[RedisCommand] = []
    for key, kind in known:
        commands += [_READ_ALL[kind](key), ("PTTL", key)]
    if not commands:
        return []
    ours, others = await scanned.run(commands), await other.run(commands)
    found: list[ComparedItem] = []
    for at, (key, kind) in enumerate(known):
        here, there = ours[2 * at], others[2 * at]
        if kind == b"string":
            item = ComparedItem("string", key, b"")
            if _comparable(item, here) != _comparable(item, there):
                found.append(item)
        elif here != there:
            found += _unequal_fields(key, kind, here, there)
        lifetime = ComparedItem("lifetime", key, b"")
        if _comparable(lifetime, ours[2 * at + 1]) != _comparable(lifetime, others[2 * at + 1]):
            found.append(lifetime)
    return found


def _unequal_fields(key: bytes, kind: bytes, here: Any, there: Any) -> Iterable[ComparedItem]:
    ours, others = _pairs(here), _pairs(there)
    item_kind: ItemKind = "hash" if kind == b"hash" else "zset"
    for field in {**ours, **others}:
        if ours.get(field) != others.get(field):
            yield ComparedItem(item_kind, key, field)


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """Return a flat reply of fields and values as a dict. A key of another type has none."""
    if isinstance(reply, ReplyError) or reply is None:
        return {}
    return dict(zip(reply[::2], reply[1::2], strict=True))


async def _suspects_of_large(
    key: bytes, kind: bytes, scanned: Keyspace, other: Keyspace
) -> AsyncIterator[list[ComparedItem]]:
    """Compare the fields of a large key, page by page. Fields of the other database alone are not found here."""
    item_kind: ItemKind = "hash" if kind == b"hash" else "zset"
    scan, cursor = ("HSCAN" if kind == b"hash" else "ZSCAN"), b"0"
    while True:
        cursor, page = await scanned.call(scan, key, cursor, "COUNT", FIELDS_AT_ONCE)
        ours = _pairs(page)
        items = [ComparedItem(item_kind, key, field) for field in ours]
        others = await other.run([_read_command(item) for item in items]) if items else []
        yield [
            item
            for item, (field, value), reply in zip(items, ours.items(), others, strict=True)
            if _comparable(item, value) != _comparable(item, reply)
        ]
        if cursor == b"0":
            return


# -- steps 3 and 4: items -----------------------------------------------------------------------------------


def _unequal(
    items: Sequence[ComparedItem], live: Sequence[Any], replayed: Sequence[Any]
) -> Iterable[Difference]:
    for item, ours, others in zip(items, live, replayed, strict=True):
        found = Difference(item, _comparable(item, ours), _comparable(item, others))
        if found.live != found.replayed:
            yield found


def _read_command(item: ComparedItem) -> RedisCommand:
    match item.kind:
        case "string":
            return ("GET", item.key)
        case "hash":
            return ("HGET", item.key, item.field)
        case "zset":
            return ("ZSCORE", item.key, item.field)
        case _:
            return ("PTTL", item.key)


def _comparable(item: ComparedItem, reply: Any) -> bytes | None:
    """Return the part of a reply that is compared. None: the database does not have the item."""
    if isinstance(reply, ReplyError):
        return str(reply).encode()
    if item.kind == "lifetime":
        # PTTL: -2 without a key, -1 without an expiry, else the ms that are left.
        return {-2: None, -1: b"for ever"}.get(reply, b"for a time")
    if item.kind == "string" and reply is not None and item.key.rpartition(b":")[2] == FENCE_SUFFIX:
        try:
            return msgspec.json.encode(without_batch_fields(msgspec.json.decode(reply)))
        # Not a fence, although it has the name of one.
        except (ValueError, AttributeError):
            return bytes(reply)
    return None if reply is None else bytes(reply)
