"""Whether the Kafka and the Redis of the user answer: checked before a stack starts anything.

An error names the address, and the option, the variable or the line of the file that it came from.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka.diagnosis import unreachable
from millpond.pipeline.settings import ENVIRONMENT_PREFIX, KafkaSettings
from millpond.pipeline.stack.servers import kafka_answers
from millpond.pipeline.stores.redis.connection import Connection
from millpond.pipeline.stores.redis.location import access_of, addresses, locate
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.schemas.errors import MillpondError, StoreDown, StoreError
from millpond.schemas.rules import Pool, Rules
from millpond.schemas.rules.toml_lines import TomlLines


async def check_kafka(settings: KafkaSettings, source: str) -> None:
    """Return if Kafka answers.

    Raises:
        ConfigError: a setting of the connection is wrong.
        MillpondError: Kafka cannot be reached.
    """
    if await kafka_answers(settings):
        return
    error = await unreachable(settings)
    raise type(error)(f"{error} (from {source})")


async def check_redis(rules: Rules, source: str | None, rules_file: Path | None) -> None:
    """Return if the pool of each agent answers. `source` is where one address for all pools came from.

    Raises:
        ConfigError: a file of the pool cannot be read.
        MillpondError: a pool does not answer, or refuses.
    """
    for pool in {pool.name: pool for pool in map(rules.pool, AGENT_NAMES)}.values():
        try:
            await _connect(pool)
        except StoreError as error:
            servers = ", ".join(map(str, addresses(pool)))
            found = source or source_of_pool(pool, rules_file)
            remedy = "start it, or " if isinstance(error, StoreDown) else ""
            raise MillpondError(
                f"Redis at {servers} (from {found}): {error}; {remedy}use `--redis embedded` for one of the stack's own"
            ) from error


async def _connect(pool: Pool) -> None:
    access = access_of(pool)
    if pool.type == "cluster":
        nodes = Nodes(addresses(pool), access)
        try:
            await nodes.discover()
        finally:
            await nodes.close()
    else:
        connection = await Connection.open(await locate(pool, access), access)
        await connection.close()


def source_of(config: Path | None, option: str, given: str | None, *setting: str) -> str:
    """Return where the value of a setting came from: the option, the variable, or the file and its line."""
    if given is not None:
        return option
    variable = ENVIRONMENT_PREFIX + "_".join(setting).upper()
    if variable in os.environ or config is None:
        return variable
    return _line(config, *setting)


def source_of_pool(pool: Pool, rules_file: Path | None) -> str:
    """Return the line of the rules file that has the address of a pool."""
    if rules_file is None:
        return "the default"
    text = rules_file.read_text("utf-8", "replace")
    key = re.compile(rf"\s*backend\.redis\.{re.escape(pool.name)}\.server\s*=")
    for number, line in enumerate(text.split("\n"), start=1):
        if key.match(line):
            return f"{rules_file}:{number}"
    try:
        written = tomllib.loads(text).get("pool", {}).get(pool.name, {})
    except tomllib.TOMLDecodeError:
        return str(rules_file)
    return _line(rules_file, "pool", pool.name, "server") if written else str(rules_file)


def _line(file: Path, *path: str) -> str:
    return f"{file}:{TomlLines(file.read_text('utf-8')).of(*path)}"
