"""`millpond redis`: any Redis command, for machines without redis-cli.

The output has the form that redis-cli writes to a pipe.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer
from hiredis import ReplyError

from millpond.pipeline.cli.common import DEFAULT_DATA, ConfigOption, DataOption, load_settings
from millpond.pipeline.process.signals import run
from millpond.pipeline.stores.redis.connection import COMMAND_TIMEOUT_S
from millpond.pipeline.stores.redis.location import connector
from millpond.schemas.errors import MillpondError
from millpond.schemas.rules.pool import Pool

NEVER_S: Final = float("inf")


def redis(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="A Redis command, as in redis-cli.")
    ],
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0,
            help="Seconds to wait for the reply; 0 waits for a BLPOP or a BGSAVE.",
        ),
    ] = COMMAND_TIMEOUT_S,
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Run one Redis command, for example: `millpond redis ZRANGE mqtt:msg:t 0 -1`."""
    _, rules = load_settings(config, data)
    reply = run(_ask(rules.pool("messages"), command, timeout or NEVER_S))
    if isinstance(reply, ReplyError):
        raise MillpondError(f"(error) {reply}")
    for line in _lines(reply):
        sys.stdout.buffer.write(line + b"\n")


async def _ask(pool: Pool, command: list[str], timeout_s: float) -> Any:
    connection = await connector(pool, timeout_s)()
    try:
        (reply,) = await connection.call(*command)
    finally:
        await connection.close()
    return reply


def _lines(reply: Any) -> list[bytes]:
    match reply:
        case None:
            return [b""]
        case bytes():
            return [reply]
        case list():
            return [line for item in reply for line in _lines(item)]
        case _:
            return [str(reply).encode()]
