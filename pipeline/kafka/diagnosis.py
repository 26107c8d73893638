"""Why Kafka cannot be reached: aiokafka tells its log, and raises the same for a wrong password as for a wrong port."""

from __future__ import annotations

from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError

from millpond.pipeline.settings import KafkaSettings
from millpond.schemas.errors import ConfigError


async def unreachable(settings: KafkaSettings) -> ConfigError:
    """The error to raise after a client could not start: each bootstrap server asked once more, and what it said."""
    options = settings.client_options()
    said = [f"{server}: {await _ask(server, options)}" for server in options["bootstrap_servers"]]
    return ConfigError(f"Kafka cannot be reached: {'; '.join(said)}")


async def _ask(server: str, options: dict[str, object]) -> str:
    host, _, port = server.rpartition(":")
    if not port.isdigit():
        return "is not HOST:PORT"
    connection = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    try:
        (await create_conn(host.strip("[]"), int(port), **connection)).close()
    except (TimeoutError, OSError, KafkaError) as error:
        return str(error) or type(error).__name__
    return "accepts connections, but not our requests"
