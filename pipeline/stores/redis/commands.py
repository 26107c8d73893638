"""A list of Redis commands with the source of each, so that an error reply becomes a refusal of the right record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from hiredis import ReplyError

from millpond.agents.effects import (
    NO_SOURCE,
    Effect,
    ForgetPresence,
    KeepReceipt,
    Refusal,
    RefusedPart,
    Reindex,
    Retain,
    RunCommand,
    SetPresence,
    ShowOffset,
    StoreMessage,
)
from millpond.pipeline.stores.redis.connection import Argument, RedisCommand, pack

# The source of a command: an effect, the messages of one ZADD, or None for the partition's own state.
RecordSource: TypeAlias = Effect | tuple[StoreMessage | Reindex, ...] | None

# Which part of a record fails with a command of this effect. All other effects are removals.
_PART: Final[dict[type[Any], RefusedPart]] = {
    StoreMessage: "body",
    Reindex: "body",
    Retain: "retained",
    KeepReceipt: "receipt",
    SetPresence: "presence",
    ForgetPresence: "presence",
    ShowOffset: "read offset",
    RunCommand: "command",
}


class CommandList:
    """Commands in order: `sources[n]` is the source of `commands[n]`."""

    __slots__ = ("commands", "sources")

    def __init__(self) -> None:
        self.commands: list[RedisCommand] = []
        self.sources: list[RecordSource] = []

    def add(self, source: RecordSource, *command: Argument) -> None:
        """Append one command."""
        self.commands.append(command)
        self.sources.append(source)

    def extend(self, other: CommandList) -> None:
        """Append all commands of another list."""
        self.commands += other.commands
        self.sources += other.sources

    def without(self, positions: Iterable[int]) -> CommandList:
        """Return a copy without the commands at these positions."""
        left_out, copy = set(positions), CommandList()
        for at, command in enumerate(self.commands):
            if at not in left_out:
                copy.add(self.sources[at], *command)
        return copy

    def split(self, kind: type[Effect]) -> tuple[CommandList, CommandList]:
        """Return the commands of other effects, and the commands of effects of this kind."""
        others, those = CommandList(), CommandList()
        for command, source in zip(self.commands, self.sources, strict=True):
            (those if isinstance(source, kind) else others).add(source, *command)
        return others, those

    def packed(self) -> bytes:
        """Encode the commands for the wire."""
        return b"".join(map(pack, self.commands))


def concerned_parts(source: RecordSource) -> list[tuple[int, RefusedPart]]:
    """Return the offset and the part of each record that a refused command concerns."""
    assert source is not None, "a refused command of the partition's own state concerns no record"
    if isinstance(source, tuple):
        return [(message.offset, "index") for message in source]
    return [(getattr(source, "offset", NO_SOURCE), _PART.get(type(source), "removal"))]


def refusals(sources: Sequence[RecordSource], replies: Sequence[Any]) -> list[Refusal]:
    """Return a refusal for each error reply. A part of a record is refused once, with its first error."""
    found: dict[tuple[int, RefusedPart], str] = {}
    for source, reply in zip(sources, replies, strict=True):
        if isinstance(reply, ReplyError):
            for concerned in concerned_parts(source):
                found.setdefault(concerned, str(reply))
    return [Refusal(offset, part, reason) for (offset, part), reason in found.items()]
