"""Ports on 127.0.0.1: requested ones, if they are free, or random ones."""

from __future__ import annotations

import random
import socket
from typing import Final

from millpond.schemas.errors import ConfigError

HOST: Final = "127.0.0.1"
# Below the range from which systems take ports for outgoing connections. Such a connection could take a chosen port
# before its server listens.
FREE_PORTS: Final = range(15_000, 32_000)


def free_port() -> int:
    """Pick a random port on which no process listens now."""
    while True:
        port = random.choice(FREE_PORTS)  # noqa: S311  not a secret
        if _is_free(port):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def claim(port: int, option: str) -> int:
    """Return the port if it is free; pick a free port for 0.

    Raises:
        ConfigError: the port is in use. The message names the option that changes it.
    """
    if port == 0:
        return free_port()
    if not _is_free(port):
        raise ConfigError(
            f"port {port} is in use: choose another with {option} PORT ({option} 0 picks a free one)"
        )
    return port
