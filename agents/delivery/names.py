"""Names under keys, of which most have one name only."""

from __future__ import annotations

from collections.abc import Iterable


class Names:
    """Names by key, each key's in the order in which they came. One that is alone costs no dict, which takes 200 bytes."""

    def __init__(self) -> None:
        """Empty."""
        self._alone: dict[str, str] = {}
        self._several: dict[str, dict[str, None]] = {}

    def of(self, key: str) -> Iterable[str]:
        """The names under a key."""
        if key in self._several:
            return self._several[key]
        return (self._alone[key],) if key in self._alone else ()

    def add(self, key: str, name: str) -> None:
        """One more; again is nothing."""
        if key in self._several:
            self._several[key][name] = None
        elif self._alone.setdefault(key, name) != name:
            self._several[key] = {self._alone.pop(key): None, name: None}

    def remove(self, key: str, name: str) -> bool:
        """One less, that was there; whether it was the key's last one."""
        several = self._several.get(key)
        if several is None:
            del self._alone[key]
            return True
        del several[name]
        if len(several) == 1:
            (self._alone[key],) = self._several.pop(key)
        return False
