"""Redis commands side by side with what each stands for, so that an error reply can be told to whom it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

from hiredis import ReplyError

from millpond.agents.effects import (
    NO_SOURCE,
    Effect,
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

# What a command stands for: an effect, the messages of one ZADD, or None for the partition's own state.
RecordSource: TypeAlias = Effect | tuple[StoreMessage | Reindex, ...] | None

_PART: Final[dict[type[Any], RefusedPart]] = {
    StoreMessage: "body",
    Reindex: "body",
    Retain: "retained",
    KeepReceipt: "receipt",
    SetPresence: "presence",
    ShowOffset: "read offset",
    RunCommand: "command",
}


class CommandList:
    """Commands in order, and what each stands for."""

    __slots__ = ("commands", "sources")

    def __init__(self) -> None:
        """Nothing yet."""
        self.commands: list[RedisCommand] = []
        self.sources: list[RecordSource] = []

    def add(self, source: RecordSource, *command: Argument) -> None:
        """One more."""
        self.commands.append(command)
        self.sources.append(source)

    def extend(self, other: CommandList) -> None:
        """All of another list."""
        self.commands += other.commands
        self.sources += other.sources

    def without(self, positions: Iterable[int]) -> CommandList:
        """A copy that leaves out what stands at `positions`."""
        left_out, copy = set(positions), CommandList()
        for at, command in enumerate(self.commands):
            if at not in left_out:
                copy.add(self.sources[at], *command)
        return copy

    def split(self, kind: type[Effect]) -> tuple[CommandList, CommandList]:
        """The commands that do not stand for a `kind`, and those that do."""
        others, those = CommandList(), CommandList()
        for command, source in zip(self.commands, self.sources, strict=True):
            (those if isinstance(source, kind) else others).add(source, *command)
        return others, those

    def packed(self) -> bytes:
        """The commands as they go over the wire."""
        return b"".join(map(pack, self.commands))


def stands_for(source: RecordSource) -> list[tuple[int, RefusedPart]]:
    """The records that a refused command concerns, and which part of what they asked for."""
    assert source is not None, "the partition's own state is no record's part"
    if isinstance(source, tuple):
        return [(message.offset, "index") for message in source]
    return [(getattr(source, "offset", NO_SOURCE), _PART.get(type(source), "removal"))]


def refusals(sources: Sequence[RecordSource], replies: Sequence[Any]) -> list[Refusal]:
    """What the server refused, by the error replies; each part of a record once."""
    found: dict[tuple[int, RefusedPart], str] = {}
    for source, reply in zip(sources, replies, strict=True):
        if isinstance(reply, ReplyError):
            for concerned in stands_for(source):
                found.setdefault(concerned, str(reply))
    return [Refusal(offset, part, reason) for (offset, part), reason in found.items()]
