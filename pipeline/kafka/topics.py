"""Creates Millpond's Kafka topics (`millpond kafka init`), and checks them (`millpond kafka check`)."""

from __future__ import annotations

from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import for_code

from millpond.pipeline.kafka.answers import answer, command_options, connected
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError

MISSING: Final = "does not exist: run `millpond kafka init`"
PARTITIONS: Final = "partitions"
CREATE_TIMEOUT_S: Final = 30.0  # Kafka answers when all partitions have a leader
TOPIC_EXISTS: Final = 36  # Kafka's error code TOPIC_ALREADY_EXISTS
# INVALID_PARTITIONS, INVALID_REPLICATION_FACTOR, INVALID_CONFIG, POLICY_VIOLATION: the settings of the topics are wrong.
REFUSED_SETTINGS: Final = (37, 38, 40, 44)


def wanted(settings: KafkaSettings) -> dict[str, str]:
    """Return the configuration that every topic of Millpond must have."""
    return {
        # The agents' clock is the time at which Kafka appended a record, not a time that the writer sets.
        "message.timestamp.type": "LogAppendTime",
        "cleanup.policy": "delete",
        "retention.ms": str(settings.retention_hours * 3_600_000),
        "max.message.bytes": str(settings.message_bytes_max),
        "min.insync.replicas": str(settings.min_insync_replicas),
        "unclean.leader.election.enable": "false",
    }


async def create(settings: KafkaSettings) -> list[str]:
    """Create the missing topics, and return their names. Existing topics stay as they are.

    Raises:
        ConfigError: Kafka refuses the settings of the connection or of a topic.
        MillpondError: Kafka cannot be reached, or failed.
    """
    options = {**command_options(settings), "request_timeout_ms": int(CREATE_TIMEOUT_S * 1000)}
    admin = AIOKafkaAdminClient(**options)
    async with connected(settings, admin):
        topics = [
            NewTopic(
                name,
                settings.partitions,
                settings.replication_factor,
                topic_configs=wanted(settings),
            )
            for name in keys.TOPICS
        ]
        creating = admin.create_topics(topics)
        response = await answer(settings, "create the topics", creating, CREATE_TIMEOUT_S)
    created = []
    for name, code, reason in response.topic_errors:
        if code == 0:
            created.append(name)
        elif code != TOPIC_EXISTS:
            kind = ConfigError if code in REFUSED_SETTINGS else MillpondError
            raise kind(f"Kafka refused to create {name}: {reason or for_code(code).__name__}")
    return created


def stops_workers(deviation: str) -> bool:
    """True if workers do not start with this deviation. With any other they run, with a weaker guarantee."""
    return deviation.endswith(MISSING) or f": {PARTITIONS} is " in deviation


async def check(settings: KafkaSettings) -> list[str]:
    """Return the deviations of the topics from the settings, one sentence each.

    Raises:
        MillpondError: Kafka cannot be reached, or failed.
    """
    admin = AIOKafkaAdminClient(**command_options(settings))
    async with connected(settings, admin):
        describing = admin.describe_topics(list(keys.TOPICS))
        described = await answer(settings, "describe the topics", describing)
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in keys.TOPICS]
        reading = admin.describe_configs(resources)
        configured = await answer(settings, "read the settings of the topics", reading)
    configs = _configs(configured)
    deviations: list[str] = []
    for topic in described:
        name, partitions = topic["topic"], topic["partitions"]
        if topic["error_code"]:
            deviations.append(f"{name} {MISSING}")
            continue
        replicas = min(len(partition["replicas"]) for partition in partitions)
        found = {
            **configs.get(name, {}),
            PARTITIONS: str(len(partitions)),
            "replication factor": str(replicas),
        }
        expected = {
            **wanted(settings),
            PARTITIONS: str(settings.partitions),
            "replication factor": str(settings.replication_factor),
        }
        deviations += [
            f"{name}: {setting} is {found.get(setting)}, expected {value}"
            for setting, value in expected.items()
            if found.get(setting) != value
        ]
    return deviations


def _configs(responses: Any) -> dict[str, dict[str, str]]:
    return {
        name: {entry[0]: entry[1] for entry in entries}
        for response in responses
        for _, _, _, name, entries in response.resources
    }
