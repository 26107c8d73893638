"""The rules in force of a partition: the last ones in its log. In the end they are this worker's own."""

from __future__ import annotations

from millpond.agents.ports import Log, LogBounds
from millpond.schemas import codec, keys
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import RulesChanged
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules


async def first_rules_in_log(partition: Partition, bounds: LogBounds, log: Log) -> str | None:
    """Return the first rules that the log names, to rebuild a state that the store has lost.

    The partition's first owner folded the records in front of its own `rules.changed` by the same rules. So folding
    them by those rules again repeats the original run.

    Returns:
        The rules in canonical form. None if the partition was never folded, if the log has lost its beginning, or if
        it holds no readable `rules.changed`.
    """
    # `start` is 0 while the log has its beginning. Without a committed offset nothing was folded before.
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
                    # The first run could not read this record either: it became a dead letter.
                    continue
    return None


class RulesInForce:
    """Compares this worker's rules with those that the log has put in force."""

    def __init__(self, configured: Rules) -> None:
        """`configured` are this worker's."""
        self._configured = configured
        self._wanted = configured.canonical()
        self._in_force: str | None = None  # None until a `rules.changed` is folded
        self._announced = False  # this worker's rules are in the log, and not yet folded

    def restore(self, canonical: str | None) -> Rules:
        """Return the rules to fold by: those of the store, or this worker's if the store has none.

        Raises:
            DecodeError: the rules in the store cannot be read.
        """
        rules = self._configured if canonical is None else Rules.from_canonical(canonical)
        self._in_force = None if canonical is None else rules.canonical()
        self._announced = False
        return rules

    def changed(self, rules: Rules) -> None:
        """Note that a record has put `rules` in force."""
        self._in_force = rules.canonical()
        if self._in_force == self._wanted:
            self._announced = False

    def to_announce(self) -> str | None:
        """Return this worker's rules if they are neither in force nor announced; they count as announced then."""
        if self._in_force == self._wanted or self._announced:
            return None
        self._announced = True
        return self._wanted
