"""Finds out why Kafka cannot be reached.

aiokafka raises the same error for a wrong password as for a wrong port, and writes the reason only to its log.
"""

from __future__ import annotations

from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError

from millpond.pipeline.settings import KafkaSettings
from millpond.schemas.errors import ConfigError


async def unreachable(settings: KafkaSettings) -> ConfigError:
    """Connect to each bootstrap server once more, and return the error that names what failed for each."""
    options = settings.client_options()
    found = [
        f"{server}: {await _probe(server, options)}" for server in options["bootstrap_servers"]
    ]
    return ConfigError(f"Kafka cannot be reached: {'; '.join(found)}")


async def _probe(server: str, options: dict[str, object]) -> str:
    """Return what is wrong with a server."""
    host, _, port = server.rpartition(":")
    if not port.isdigit():
        return "is not HOST:PORT"
    connection = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    try:
        (await create_conn(host.strip("[]"), int(port), **connection)).close()
    except (TimeoutError, OSError, KafkaError) as error:
        return str(error) or type(error).__name__
    return "accepts connections, but the client could not start: see the log of the broker"
