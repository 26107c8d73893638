"""Every error that Millpond raises on purpose: who is at fault, and what happens next.

```
MillpondError
├── ConfigError        the user's file       nothing starts
│   └── ConfigFaults   several of them       one line for each
├── DecodeError        one record            it becomes a dead letter
├── StoreError         the store
│   ├── StoreDown      not reachable         back off, load, compare, continue
│   ├── Fenced         another owner wrote   load, compare, continue
│   └── StoreRefused   it will not serve     the worker stops
├── LogMismatch        store and log         the worker refuses to start
├── LogRefused         Kafka's topic         the worker stops; the outputs stay in the journal
└── BrokenInvariant    Millpond's own bug    the worker stops before it commits
```

Errors of a client library are translated once, where the library is called.
"""

from __future__ import annotations

from collections.abc import Sequence


class MillpondError(Exception):
    """Root of the tree. Any exception outside of it is a bug."""


class ConfigError(MillpondError):
    """The user's settings or rules are wrong. Nothing starts, and the message says what to change."""

    def __init__(self, reason: str, *, file: str | None = None, line: int | None = None) -> None:
        """Put `file` and `line` (from 1), as far as they are known, in front of the reason."""
        self.reason, self.file, self.line = reason, file, line
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(f"{where}: {reason}" if where else reason)

    @property
    def faults(self) -> Sequence[ConfigError]:
        """Every fault that this error reports, in the order in which a reader meets them."""
        return (self,)


class ConfigFaults(ConfigError):
    """Several faults. The text has one line for each; the other attributes are those of the first."""

    def __init__(self, faults: Sequence[ConfigError]) -> None:
        """Keep the faults in their order."""
        first = faults[0]
        super().__init__(first.reason, file=first.file, line=first.line)
        self.args = ("\n".join(map(str, faults)),)
        self._faults = tuple(faults)

    @property
    def faults(self) -> Sequence[ConfigError]:
        return self._faults


class DecodeError(MillpondError):
    """One record cannot be decoded or makes no sense. It becomes a dead letter, and its partition continues."""


class StoreError(MillpondError):
    """Root of what a store raises."""


class StoreDown(StoreError):
    """The store does not answer, or is not ready. Whether it applied the last transaction is unknown."""


class Fenced(StoreError):
    """The fence is not the expected one: another owner wrote it, or the store lost data. Nothing was applied."""


class StoreRefused(StoreError):
    """The store answers, but refuses: credentials, a certificate, or foreign keys. The message names the reason."""


class LogMismatch(MillpondError):
    """The applied offset in the store does not belong to this Kafka log. The message names both sides."""


class LogRefused(MillpondError):
    """Kafka answers, but refuses a record. The message names the topic and Kafka's reason."""


class BrokenInvariant(MillpondError):
    """A bug of Millpond's own. The worker stops before it commits, and the message names the record."""
