"""A model of a Redis server: typed values under the same keys, in memory. It is deterministic and has no clock.

State:

- `values`: key → string (`bytes`), `Hash` or `Zset`. An empty hash or sorted set has no key, as in Redis.
- `expires_at`: key → expiry in ms. The model stores it for comparisons, and never deletes by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from msgspec import Struct, field

from millpond.schemas.keys import Partition

WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"


class Hash(dict[str, bytes]):
    """A hash: field → value."""


class Zset(dict[str, int]):
    """A sorted set: member → score."""

    def ordered(self) -> list[tuple[str, int]]:
        """Return members and scores in the order of Redis: by score, then by the bytes of the member."""
        return sorted(self.items(), key=lambda item: (item[1], item[0].encode()))


Value: TypeAlias = bytes | Hash | Zset
Kind = TypeVar("Kind", Hash, Zset)
Moment: TypeAlias = Literal["load", "read", "before", "after"]


class StoredValue(NamedTuple):
    """The value of a key, comparable with that of another store: a hash as dict, a sorted set as ordered list; expiry in ms."""

    value: bytes | dict[str, bytes] | list[tuple[str, int]]
    expires_at: int | None


class RefusedError(Exception):
    """The server refuses one command. It becomes a `Refusal`."""


class MemoryServer(Struct):
    """The content that the stores of all partitions and owners share.

    `fault` is called at each of four moments, and may raise `StoreDown` or `StoreRefused`:

    - `load` and `read`: before a load, and before a read or a check.
    - `before`: before a transaction is applied. Nothing of it is then applied.
    - `after`: after a transaction was applied. Its reply is then lost.
    """

    values: dict[str, Value] = field(default_factory=dict)
    expires_at: dict[str, int] = field(default_factory=dict)
    fault: Callable[[Moment, Partition], None] = lambda _moment, _partition: None

    def text(self, key: str) -> bytes | None:
        """Return the string of a key, or None. Raises RefusedError for a key of another type."""
        value = self.values.get(key)
        if isinstance(value, Hash | Zset):
            raise RefusedError(WRONG_TYPE)
        return value

    def of(self, key: str, kind: type[Kind]) -> Kind:
        """Return the value of a key; without a key, an empty one that `keep` has not stored yet.

        Raises:
            RefusedError: the key is of another type.
        """
        value = self.values.get(key)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise RefusedError(WRONG_TYPE)
        return value

    def keep(self, key: str, value: Value) -> None:
        """Set a key, or remove it if the hash or sorted set is empty."""
        if value or isinstance(value, bytes):
            self.values[key] = value
        else:
            self.remove(key)

    def remove(self, key: str) -> None:
        """Remove a key."""
        self.values.pop(key, None)
        self.expires_at.pop(key, None)

    def expire(self, key: str, at: int) -> None:
        """Store when an existing key expires. In the real server this is only a safety net, so nothing expires here."""
        if key in self.values:
            self.expires_at[key] = at

    def dump(self) -> dict[str, StoredValue]:
        """Return the whole content, to compare it with that of another store."""
        return {
            key: StoredValue(comparable(value), self.expires_at.get(key))
            for key, value in sorted(self.values.items())
        }


def comparable(value: Value) -> bytes | dict[str, bytes] | list[tuple[str, int]]:
    """Return a value as in `StoredValue`."""
    match value:
        case Zset():
            return value.ordered()
        case Hash():
            return dict(value)
        case _:
            return value
