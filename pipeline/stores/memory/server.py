"""What a Redis server would hold, in memory: typed values under the same keys. Deterministic, without a clock."""

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
        """Members and scores, by score, then by the bytes of the member."""
        return sorted(self.items(), key=lambda item: (item[1], item[0].encode()))


Value: TypeAlias = bytes | Hash | Zset
Kind = TypeVar("Kind", Hash, Zset)
Moment: TypeAlias = Literal["load", "read", "before", "after"]


class StoredValue(NamedTuple):
    """What a key holds, comparable: a hash as a dict, a sorted set as an ordered list; expiry in ms."""

    value: bytes | dict[str, bytes] | list[tuple[str, int]]
    expires_at: int | None


class RefusedError(Exception):
    """One part of a batch cannot be written."""


class MemoryServer(Struct):
    """What several stores share.

    `fault` is called at each moment and may raise `StoreDown` or `StoreRefused`: `before` a
    transaction is applied, `after` it was (the reply is lost), at `load` and at `read`.
    """

    values: dict[str, Value] = field(default_factory=dict)
    expires_at: dict[str, int] = field(default_factory=dict)
    fault: Callable[[Moment, Partition], None] = lambda _moment, _partition: None

    def text(self, key: str) -> bytes | None:
        """The string a key holds."""
        value = self.values.get(key)
        if isinstance(value, Hash | Zset):
            raise RefusedError(WRONG_TYPE)
        return value

    def of(self, key: str, kind: type[Kind]) -> Kind:
        """The value of a key; an empty one, not yet kept, where there is none."""
        value = self.values.get(key)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise RefusedError(WRONG_TYPE)
        return value

    def keep(self, key: str, value: Value) -> None:
        """Set a key; an empty hash or sorted set is no key at all."""
        if value or isinstance(value, bytes):
            self.values[key] = value
        else:
            self.remove(key)

    def remove(self, key: str) -> None:
        """Remove a key."""
        self.values.pop(key, None)
        self.expires_at.pop(key, None)

    def expire(self, key: str, at: int) -> None:
        """Note when a key expires. Nothing ever does: that is only the real store's safety net."""
        if key in self.values:
            self.expires_at[key] = at

    def dump(self) -> dict[str, StoredValue]:
        """Everything, to compare with another store's content."""
        return {
            key: StoredValue(comparable(value), self.expires_at.get(key))
            for key, value in sorted(self.values.items())
        }


def comparable(value: Value) -> bytes | dict[str, bytes] | list[tuple[str, int]]:
    """A value as `StoredValue` shows it."""
    match value:
        case Zset():
            return value.ordered()
        case Hash():
            return dict(value)
        case _:
            return value
