"""Whose rules a partition is folded by: the last ones in its log, which are this worker's in the end."""

from __future__ import annotations

from millpond.agents.ports import Log, LogBounds
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import RulesChanged
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules


async def lost_rules(partition: Partition, bounds: LogBounds, log: Log) -> str | None:
    """The rules that the log begins with, where the store holds nothing of what was folded before: those that the log
    names first, since who folded it first announced them only behind what waited there. None if nothing was folded
    before, or the log has lost its beginning, or names none.
    """
    if bounds.committed is None or bounds.start:
        return None
    own = keys.agent_record_key(partition.agent).encode()
    async for run in log.read(partition, bounds.start, bounds.end):
        for record in run:
            if record.key == own:
                try:
                    event = codec.decode(record.value)
                    if isinstance(event, RulesChanged):
                        return Rules.from_canonical(event.rules).canonical()
                except DecodeError:
                    continue  # nobody could put those in force
    return None


class RulesInForce:
    """Compares this worker's rules with those that the log has put in force."""

    def __init__(self, configured: Rules) -> None:
        """`configured` are this worker's."""
        self._configured = configured
        self._wanted = configured.canonical()
        self._in_force: str | None = None  # None until a record has set them
        self._under_way = False

    def restore(self, canonical: str | None) -> Rules:
        """The rules to go on with: those in the store, else this worker's.

        Raises:
            DecodeError: what the store holds cannot be read.
        """
        rules = self._configured if canonical is None else Rules.from_canonical(canonical)
        self._in_force = None if canonical is None else rules.canonical()
        self._under_way = False
        return rules

    def changed(self, rules: Rules) -> None:
        """A record has put `rules` in force."""
        self._in_force = rules.canonical()
        if self._in_force == self._wanted:
            self._under_way = False

    def to_announce(self) -> str | None:
        """This worker's rules, if they are neither in force nor on their way."""
        if self._in_force == self._wanted or self._under_way:
            return None
        self._under_way = True
        return self._wanted
