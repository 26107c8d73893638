"""Optional dependencies: imported when they are used. If one is missing, the error names its extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from millpond.schemas.errors import ConfigError


@contextmanager
def extra(name: str, needed_by: str) -> Iterator[None]:
    """Wrap the imports that need the extra `name` of the package.

    Raises:
        ConfigError: A module is missing. The message names the user of the module and what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # A missing module of ours is a bug, not a missing extra.
        if (error.name or "").partition(".")[0] == "millpond":
            raise
        raise ConfigError(f"{needed_by} needs pip install 'millpond[{name}]'") from error
