"""What `millpond config check` finds: what would not run, and what weakens a guarantee.

The second is a choice of the user, so it is a note. The first is found by trying it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from hiredis import ReplyError
from msgspec import structs

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.pipeline.stores.redis.cluster_check import cluster_weaknesses
from millpond.pipeline.stores.redis.command_check import check_commands
from millpond.pipeline.stores.redis.connection import COMMAND_TIMEOUT_S
from millpond.pipeline.stores.redis.location import connector
from millpond.pipeline.stores.redis.trial import try_pool
from millpond.pipeline.text_files import read_text
from millpond.schemas.errors import ConfigError, MillpondError, StoreDown, StoreError
from millpond.schemas.keys import SOURCE_TOPIC
from millpond.schemas.rules import Rules, default_rules
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Rule
from millpond.schemas.topics import covers

# Redis keeps a hash in its compact encoding, with half the memory, while no value is longer than its limit.
LISTPACK_VALUE_BYTES: Final = 1_024
STORING_ACTIONS: Final = ("on_message_publish", "on_message_store_keep_latest")
NAMED_MAX: Final = 5  # topic filters in one note
REDIS_SETTINGS: Final = ("maxmemory-policy", "appendonly", "save", "hash-max-listpack-value")


class Findings(NamedTuple):
    """`errors`: what would not run. `notes`: what runs, and weakens a guarantee."""

    errors: list[str]
    notes: list[str]


async def examine(settings: Settings, rules: Rules) -> Findings:
    """Try what the processes will do with these settings: read files, log in, select, subscribe. Change nothing."""
    found = Findings([], [*_missing_agents(rules), *_kafka_settings(settings.kafka, rules)])
    found.errors.extend(_unreadable(settings))
    await _kafka(settings.kafka, settings.app, found)
    # `millpond up` starts a Redis of its own for these.
    own_redis = settings.redis is None and rules == default_rules()
    for pool in rules.pools:
        await _redis(pool, settings.app, rules, found, own=own_redis)
    return found


def _missing_agents(rules: Rules) -> list[str]:
    return [
        f"rules for the agent {agent} are accepted, but this version has no such agent:"
        " its events wait in Kafka"
        for agent in SOURCE_TOPIC
        if agent not in AGENT_NAMES and rules.of_agent(agent)
    ]


def _kafka_settings(kafka: KafkaSettings, rules: Rules) -> list[str]:
    found = []
    if kafka.min_insync_replicas < 2:
        found.append(
            "[kafka] min_insync_replicas is 1: an acknowledged publish may be on one broker only"
        )
    return [*found, *_retention(kafka.retention_hours, rules)]


def _retention(hours: int, rules: Rules) -> list[str]:
    """Messages that Redis stores longer than Kafka keeps the log to rebuild them from."""
    stored = f"[kafka] retention_hours is {hours}, but messages"
    back = "Redis can be rebuilt only as far back as the log goes"
    found = []
    stores = [rule for rule in rules.rules if rule.hook != "client.disconnected"]
    longest = max((rule.expired_time or 0 for rule in stores), default=0)
    if longest > hours * 3600:
        found.append(f"{stored} are kept {longest} s: {back}")
    for_ever = list(
        dict.fromkeys(rule.topic_filter for rule in rules.rules if _for_ever(rule, rules))
    )
    if for_ever:
        named = ", ".join(map(repr, for_ever[:NAMED_MAX]))
        more = f" and {len(for_ever) - NAMED_MAX} more" if len(for_ever) > NAMED_MAX else ""
        found.append(f"{stored} of {named}{more} never expire: {back}")
    return found


def _for_ever(rule: Rule, rules: Rules) -> bool:
    """True if messages of this rule never expire. A delivery rule without expired_time uses that of a store rule."""
    if rule.expired_time is not None:
        return False
    if rule.delivery_agent is None:
        return rule.action in STORING_ACTIONS or rule.action == "on_message_retain"
    return not any(
        other.action in STORING_ACTIONS and other.expired_time is not None
        and covers(other.topic_filter, rule.topic_filter)
        for other in rules.rules
    )  # fmt: skip


def _unreadable(settings: Settings) -> list[str]:
    """The files that the settings name and that cannot be read. Those of Kafka and of pools are read when they are used."""
    found = []
    for table in (settings.bridge, settings.web):
        section = f"[{type(table).__name__.removesuffix('Settings').lower()}]"
        for name, path in structs.asdict(table).items():
            if name.endswith("_file") and path is not None:
                try:
                    read_text(Path(path))
                except OSError as error:
                    found.append(f"{section} {name}: cannot read {path}: {error.strerror}")
                except ValueError as error:
                    found.append(f"{section} {name}: {path}: {error}")
    return found


async def _kafka(settings: KafkaSettings, app: str, found: Findings) -> None:
    """Connect, and compare the Kafka topics with the settings."""
    try:
        deviations = await topics.check(settings, app)
    except ConfigError as error:
        found.errors.extend(map(str, error.faults))
        return
    except MillpondError as error:
        if settings.bootstrap_servers == KafkaSettings().bootstrap_servers:
            found.notes.append(f"{error}; `millpond up` starts a Kafka of its own")
        else:
            found.errors.append(str(error))
        return
    found.errors.extend(each for each in deviations if topics.stops_workers(each))
    found.notes.extend(each for each in deviations if not topics.stops_workers(each))


async def _redis(pool: Pool, app: str, rules: Rules, found: Findings, *, own: bool) -> None:
    """Do what the workers of a pool will do at their start."""
    where = f"[pool.{pool.name}]"
    agents = [agent for agent in AGENT_NAMES if rules.pool(agent) == pool]
    try:
        found.errors.extend(f"{where} {refused}" for refused in await try_pool(pool, app, agents))
        await check_commands(pool, rules)
        weaknesses = await cluster_weaknesses(pool)
        answers = await _server_settings(pool)
    except ConfigError as error:
        found.errors.extend(map(str, error.faults))
    except StoreDown as error:
        if own:
            found.notes.append(f"{where} {error}; `millpond up` starts a Redis of its own")
        else:
            found.errors.append(f"{where} {error}")
    except StoreError as error:
        found.errors.append(f"{where} {error}")
    else:
        unknown = "CONFIG GET is not allowed: check maxmemory-policy, appendonly and save yourself"
        weaknesses += [unknown] if answers is None else _redis_weaknesses(answers)
        found.notes.extend(f"{where} {weakness}" for weakness in weaknesses)


async def _server_settings(pool: Pool) -> dict[str, str] | None:
    """The settings of the Redis server; None if CONFIG GET is not allowed."""
    connection = await connector(pool, COMMAND_TIMEOUT_S)()
    answers: dict[str, str] = {}
    try:
        for name in REDIS_SETTINGS:
            (reply,) = await connection.call("CONFIG", "GET", name)
            if isinstance(reply, ReplyError):
                return None
            answers |= {key.decode(): value.decode() for key, value in zip(*[iter(reply)] * 2)}  # noqa: B905
    finally:
        await connection.close()
    return answers


def _redis_weaknesses(answers: Mapping[str, str]) -> list[str]:
    """Weaknesses in a Redis server's settings. A setting that the server does not have is no weakness."""
    found = []
    policy = answers.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        found.append(
            f"maxmemory-policy is {policy}: a full server deletes stored messages; set noeviction"
        )
    if answers.get("appendonly") == "no":
        kept = "snapshots only" if answers.get("save") else "nothing on disk"
        found.append(
            f"appendonly is no, {kept}: a restart loses writes, and the workers fold them again from Kafka"
        )
    if int(answers.get("hash-max-listpack-value", LISTPACK_VALUE_BYTES)) < LISTPACK_VALUE_BYTES:
        found.append(
            f"hash-max-listpack-value is {answers['hash-max-listpack-value']}: with"
            f" {LISTPACK_VALUE_BYTES} a stored message of some 100 bytes takes about half the memory"
        )
    return found
