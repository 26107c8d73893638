"""`millpond redis`: any Redis command, for machines without redis-cli.

The output has the form that redis-cli writes to a pipe.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from millpond.pipeline.cli.common import DEFAULT_DATA, ConfigOption, DataOption, load_settings
from millpond.pipeline.settings import read_secret
from millpond.pipeline.stores.registry import access_of, locate
from millpond.schemas.errors import MillpondError


def redis(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="A Redis command, as in redis-cli.")
    ],
    config: ConfigOption = None,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Run one Redis command, for example: `millpond redis ZRANGE mqtt:msg:t 0 -1`."""
    _, rules = load_settings(config, data)
    pool = rules.pool("messages")
    host, port = asyncio.run(locate(pool, access_of(pool)))
    password = pool.password
    if pool.password_file is not None:
        password = read_secret(pool.password_file, f"[pool.{pool.name}] password_file")
    client = Redis(
        host=host, port=port, db=pool.database, username=pool.username, password=password,
        ssl=pool.tls, ssl_ca_certs=pool.ca_file,
    )  # fmt: skip
    try:
        # The callbacks would turn the replies of some commands into Python objects.
        client.response_callbacks.clear()
        reply: Any = client.execute_command(*command)  # type: ignore[no-untyped-call]
    except ResponseError as error:
        raise MillpondError(f"(error) {error}") from error
    except (RedisError, OSError) as error:
        raise MillpondError(f"Redis at {host}:{port}: {error}") from error
    for line in _lines(reply):
        sys.stdout.buffer.write(line + b"\n")


def _lines(reply: Any) -> list[bytes]:
    match reply:
        case None:
            return [b""]
        case bytes():
            return [reply]
        case dict():
            return [line for pair in reply.items() for item in pair for line in _lines(item)]
        case list() | tuple() | set():
            return [line for item in reply for line in _lines(item)]
        case float():  # a score: redis-cli prints no ".0"
            return [repr(reply).removesuffix(".0").encode()]
        case _:
            return [str(reply).encode()]
