"""Every error Millpond raises on purpose: who is at fault, and what happens next."""

from __future__ import annotations


class MillpondError(Exception):
    """Root of the tree: catch this to catch everything that is not a bug."""


class ConfigError(MillpondError):
    """The user's settings or rules are wrong: nothing is started, the message says what to change."""

    def __init__(self, reason: str, *, file: str | None = None, line: int | None = None) -> None:
        """`file` and `line` (1-based) say where; both are shown in front of the reason."""
        self.reason, self.file, self.line = reason, file, line
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(f"{where}: {reason}" if where else reason)


class DecodeError(MillpondError):
    """The bytes of one record cannot be read: the record becomes a dead letter, the rest goes on."""


class StoreError(MillpondError):
    """Root of what a store reports; translated from the client library at the store's door."""


class StoreDown(StoreError):
    """The store cannot be reached or is not ready: back off, reload what it holds, compare, go on."""


class Fenced(StoreError):
    """Somebody else wrote this partition's state since it was read: reload it before deciding."""


class StoreRefused(StoreError):
    """The store answers but will not do it (credentials, read-only, out of memory): says which."""


class LogMismatch(MillpondError):
    """The store's applied offset does not belong to this Kafka log: refuse to run, name both."""


class BrokenInvariant(MillpondError):
    """A bug of ours: the worker stops before it commits, and names the record."""
