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
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    """True if no process listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class PortClaims:
    """The ports of one stack. All that cannot be had are named in one error."""

    def __init__(self) -> None:
        self._claimed: dict[int, str] = {}  # port → its option
        self._faults: list[str] = []

    def claim(self, port: int, option: str) -> int:
        """Claim a port that no process listens on, or a free one for 0. A fault is reported by `check`."""
        while port == 0:
            found = free_port()
            port = 0 if found in self._claimed else found
        if port in self._claimed:
            self._faults.append(f"port {port} is asked for by {self._claimed[port]} and {option}")
        elif not is_free(port):
            self._faults.append(f"port {port} is in use: choose another with {option} PORT")
        self._claimed[port] = option
        return port

    def check(self) -> None:
        """Raise the error about all ports that cannot be had.

        Raises:
            ConfigError: a port is in use or claimed twice. The message names the options that change them.
        """
        if self._faults:
            raise ConfigError(f"{'; '.join(self._faults)} (0 picks a free port)")
