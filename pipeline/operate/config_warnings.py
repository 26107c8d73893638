"""What weakens a guarantee, in the settings and in the servers: named by `millpond config check`, decided by the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hiredis import ReplyError

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import KafkaSettings, Settings
from millpond.pipeline.stores.redis.cluster_check import cluster_weaknesses
from millpond.pipeline.stores.redis.command_check import check_commands
from millpond.pipeline.stores.registry import connector
from millpond.schemas.errors import ConfigError, StoreError
from millpond.schemas.keys import SOURCE_TOPIC
from millpond.schemas.rules import Rules
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Rule
from millpond.schemas.topics import covers

# A payload up to this long leaves its message's hash in the compact encoding: about half the memory.
LISTPACK_VALUE_BYTES: Final = 1_024
STORING: Final = ("on_message_publish", "on_message_store_keep_latest")
NAMED: Final = 5  # topic filters of one note
ASKED_OF_REDIS: Final = ("maxmemory-policy", "appendonly", "save", "hash-max-listpack-value")


async def weaknesses(settings: Settings, rules: Rules) -> list[str]:
    """One sentence each; a server that cannot be asked is one of them.

    Raises:
        ConfigError: a user's command is one that the server does not know or that a rule must not use.
    """
    found = [*_missing_agents(rules), *_kafka_settings(settings.kafka, rules)]
    found += await _kafka(settings.kafka)
    for pool in rules.pools:
        found += await _redis(pool, rules)
    return found


def _missing_agents(rules: Rules) -> list[str]:
    return [
        f"rules for the agent {agent} are accepted, but this version has no such agent:"
        " what it would do waits in Kafka"
        for agent in SOURCE_TOPIC
        if agent not in AGENT_NAMES and rules.run_by(agent)
    ]


def _kafka_settings(kafka: KafkaSettings, rules: Rules) -> list[str]:
    found = []
    if kafka.min_insync_replicas < 2:
        found.append(
            "[kafka] min_insync_replicas is 1: an acknowledged publish is on one broker only"
        )
    return [*found, *_retention(kafka.retention_hours, rules)]


def _retention(hours: int, rules: Rules) -> list[str]:
    """What is kept longer in Redis than in the log that could bring it back."""
    held = f"[kafka] retention_hours is {hours}, but messages"
    back = "Redis can be rebuilt only as far back as the log goes"
    found = []
    longest = max((rule.expired_time or 0 for rule in rules.rules), default=0)
    if longest > hours * 3600:
        found.append(f"{held} are kept {longest} s: {back}")
    for_ever = list(
        dict.fromkeys(rule.topic_filter for rule in rules.rules if _for_ever(rule, rules))
    )
    if for_ever:
        named = ", ".join(map(repr, for_ever[:NAMED]))
        more = f" and {len(for_ever) - NAMED} more" if len(for_ever) > NAMED else ""
        found.append(f"{held} of {named}{more} never expire: {back}")
    return found


def _for_ever(rule: Rule, rules: Rules) -> bool:
    """Whether a rule keeps messages without an end. A delivery rule takes its expiry from a store rule, if need be."""
    if rule.expired_time is not None:
        return False
    if rule.delivery_agent is None:
        return rule.action in STORING or rule.action == "on_message_retain"
    return not any(
        other.action in STORING and other.expired_time is not None
        and covers(other.topic_filter, rule.topic_filter)
        for other in rules.rules
    )  # fmt: skip


async def _kafka(settings: KafkaSettings) -> list[str]:
    """Whether the topics are as `millpond kafka init` makes them."""
    try:
        return await topics.check(settings)
    except ConfigError as error:
        return [str(error)]


async def _redis(pool: Pool, rules: Rules) -> list[str]:
    where = f"[pool.{pool.name}]"
    try:
        await check_commands(pool, rules)
        found = [f"{where} {weakness}" for weakness in await cluster_weaknesses(pool)]
        answers = await _asked(pool)
    except StoreError as error:
        return [f"{where} {error}"]
    if answers is None:
        return [
            *found,
            f"{where} CONFIG GET is not allowed: see for yourself that it keeps what it is given",
        ]
    return [*found, *(f"{where} {reason}" for reason in redis_weaknesses(answers))]


async def _asked(pool: Pool) -> dict[str, str] | None:
    """The server's own settings; None if we may not read them."""
    connection = await connector(pool)()
    answers: dict[str, str] = {}
    try:
        for name in ASKED_OF_REDIS:
            (reply,) = await connection.call("CONFIG", "GET", name)
            if isinstance(reply, ReplyError):
                return None
            answers |= {key.decode(): value.decode() for key, value in zip(*[iter(reply)] * 2)}  # noqa: B905
    finally:
        await connection.close()
    return answers


def redis_weaknesses(answers: Mapping[str, str]) -> list[str]:
    """What a Redis server's settings mean for what it is given; a setting it does not have is no weakness."""
    found = []
    policy = answers.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        found.append(
            f"maxmemory-policy is {policy}: a full server forgets what was stored; set noeviction"
        )
    if answers.get("appendonly") == "no":
        kept = "snapshots only" if answers.get("save") else "nothing on disk"
        found.append(
            f"appendonly is no, {kept}: a restart loses writes, which are then folded again from Kafka"
        )
    if int(answers.get("hash-max-listpack-value", LISTPACK_VALUE_BYTES)) < LISTPACK_VALUE_BYTES:
        found.append(
            f"hash-max-listpack-value is {answers['hash-max-listpack-value']}: with"
            f" {LISTPACK_VALUE_BYTES} a stored message of some 100 bytes takes about half the memory"
        )
    return found
