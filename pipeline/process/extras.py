"""Optional dependencies: a module that needs one is imported when it is used, and a missing one names its extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from millpond.schemas.errors import ConfigError


@contextmanager
def extra(name: str, needed_by: str) -> Iterator[None]:
    """Import what the extra `name` of the package brings, inside this context.

    Raises:
        ConfigError: a module is missing; the message says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "millpond":
            raise
        raise ConfigError(f"{needed_by} needs pip install 'millpond[{name}]'") from error
