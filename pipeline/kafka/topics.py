"""Creates Millpond's Kafka topics (`millpond kafka init`), and checks them (`millpond kafka check`).

Both know the topics of one installation alone: those with its `topic_prefix`. Kafka's topics have no owner. So the check
also looks for the consumer groups of another installation that reads the same topics.
"""

from __future__ import annotations

from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    for_code,
)

from millpond.pipeline.kafka.answers import answer, command_options, connected
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError

MISSING: Final = "does not exist: run `millpond kafka init`"
PARTITIONS: Final = "partitions"
CREATE_TIMEOUT_S: Final = 30.0  # Kafka answers when all partitions have a leader
TOPIC_EXISTS: Final = 36  # Kafka's error code TOPIC_ALREADY_EXISTS
# INVALID_PARTITIONS, INVALID_REPLICATION_FACTOR, INVALID_CONFIG, POLICY_VIOLATION: the settings of the topics are wrong.
# INVALID_TOPIC: the prefix makes a name that Kafka cannot tell from another topic's, `.` and `_` are one to it.
REFUSED_SETTINGS: Final = (17, 37, 38, 40, 44)
# The user may not see groups, or Kafka has just started and does not know them yet.
GROUPS_UNKNOWN: Final = (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
)


def names(settings: KafkaSettings) -> list[str]:
    """Return the names of Millpond's topics in Kafka."""
    return [settings.topic_name(topic) for topic in keys.TOPICS]


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
    """Create the missing topics, and return their names in Kafka. Existing topics stay as they are.

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
            for name in names(settings)
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


async def check(settings: KafkaSettings, app: str) -> list[str]:
    """Return the deviations of the topics from the settings, and who else reads them, one sentence each.

    Raises:
        MillpondError: Kafka cannot be reached, or failed.
    """
    admin = AIOKafkaAdminClient(**command_options(settings))
    async with connected(settings, admin):
        describing = admin.describe_topics(names(settings))
        described = await answer(settings, "describe the topics", describing)
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names(settings)]
        reading = admin.describe_configs(resources)
        configured = await answer(settings, "read the settings of the topics", reading)
        asking = _read_by_others(admin, settings, app)
        shared = await answer(settings, "describe its consumer groups", asking)
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
    return [*deviations, *shared]


async def _read_by_others(
    admin: AIOKafkaAdminClient, settings: KafkaSettings, app: str
) -> list[str]:
    """Return a sentence for each installation that shares topics or consumer groups with this one now.

    Topics: its bridge carries out the same commands once more. Groups: Kafka would give its partitions to our workers.
    An application that was renamed has no members any more. Groups that Kafka does not show to this user are not found.
    """
    own, found = set(names(settings)), dict[str | None, str]()
    try:
        for name, _ in sorted(await admin.list_consumer_groups()):
            group_app = keys.app_of_group(name)
            if group_app is None or group_app in found:
                continue
            read = await _topics_of_group(admin, name)
            for topic in sorted(read - own if group_app == app else read & own)[:1]:
                remedy = "an app" if group_app == app else "a [kafka] topic_prefix"
                found[group_app] = (
                    f"another installation reads {topic} in the consumer group {name}:"
                    f" give one of the two {remedy} of its own"
                )
    except GROUPS_UNKNOWN:
        pass
    return list(found.values())


async def _topics_of_group(admin: AIOKafkaAdminClient, group: str) -> set[str]:
    """Return the topics that the members of a consumer group read."""
    # aiokafka 0.14 cannot decode the description of several groups at once.
    (response,) = await admin.describe_consumer_groups([group])
    # The sixth element of a described group is its list of members, the last of a member its assignment.
    return {
        topic for found in response.groups for member in found[5] for topic in _assigned(member[-1])
    }


def _assigned(assignment: bytes) -> list[str]:
    """Return the topics that a member of a consumer group reads. Empty bytes: it has no assignment yet."""
    if not assignment:
        return []
    decoded = ConsumerProtocolMemberAssignment.decode(assignment)
    return [partition.topic for partition in decoded.partitions()]


def _configs(responses: Any) -> dict[str, dict[str, str]]:
    return {
        name: {entry[0]: entry[1] for entry in entries}
        for response in responses
        for _, _, _, name, entries in response.resources
    }
