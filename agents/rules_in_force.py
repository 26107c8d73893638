"""Whose rules a partition is folded by: the last ones in its log, which are this worker's in the end."""

from __future__ import annotations

from schemas.rules import Rules


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
