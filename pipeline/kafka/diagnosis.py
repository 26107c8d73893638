"""Finds out why Kafka cannot be reached.

aiokafka raises the same error for a wrong password as for a wrong port, and writes the reason only to its log.
"""

from __future__ import annotations

import ssl
from typing import Final

from aiokafka.conn import create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

from millpond.pipeline.settings import KafkaSettings
from millpond.schemas.errors import ConfigError, MillpondError

PROBE_TIMEOUT_MS: Final = 5_000  # for one server; aiokafka's client has waited longer before
# Kafka answered, and it will not accept these settings: a username, a password, a mechanism, a CA.
OF_SETTINGS: Final = (
    AuthenticationFailedError,
    SaslAuthenticationFailed,
    IllegalSaslStateError,
    UnsupportedSaslMechanismError,
    ssl.SSLCertVerificationError,
)


async def unreachable(settings: KafkaSettings) -> MillpondError:
    """Connect to each bootstrap server once more, and return the error that names what failed for each.

    It is a ConfigError if one of the servers refuses the settings, and a MillpondError if Kafka is down.
    """
    options = settings.client_options()
    found = [(server, await _probe(server, options)) for server in options["bootstrap_servers"]]
    kind = ConfigError if any(isinstance(why, OF_SETTINGS) for _, why in found) else MillpondError
    reasons = (f"{server}: {_sentence(why)}" for server, why in found)
    return kind(f"Kafka cannot be reached: {'; '.join(reasons)}")


async def _probe(server: str, options: dict[str, object]) -> Exception | None:
    """Return why a server cannot be connected to, or None if it accepts connections."""
    host, _, port = server.rpartition(":")
    connection = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    try:
        opened = await create_conn(
            host.strip("[]"), int(port), request_timeout_ms=PROBE_TIMEOUT_MS, **connection
        )
    except (TimeoutError, OSError, KafkaError) as error:
        return error
    opened.close()
    return None


def _sentence(why: Exception | None) -> str:
    if why is None:
        return "accepts connections, but the client could not start: see the log of the broker"
    if isinstance(why, TimeoutError) and not str(why):
        return f"no answer within {PROBE_TIMEOUT_MS / 1000:g} s"
    return str(why) or type(why).__name__
