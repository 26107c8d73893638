"""Time travel for one subscriber of a pubsub topic: where it is to read on, worked out from what the store holds."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from millpond.agents.pubsub.state import reader_key, subscriber_named, unpack_log
from millpond.agents.reads import ReadEntry, ReadIndex, ReadLast, ReadStates
from millpond.pipeline.clock import now_ms
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.pipeline.worker.control_channel import partition_of
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import OperatorRewind
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

COUNTED_AT_ONCE: Final = 10_000  # entries of the index


class Place(NamedTuple):
    """Where a subscriber is to read on: behind this score, with so many messages to come as of now."""

    after: int
    messages: int


async def find_place(
    settings: Settings, rules: Rules, subscriber: str, topic: str, to: str
) -> tuple[OperatorRewind, Place]:
    """The order to an agent, and what it comes to. `to` is `earliest`, `latest`, an ISO time (of this machine's zone, if
    it names none) or a message id: what was published at that time or later, or from that message on, comes again.

    Raises:
        ConfigError: the topic is not pubsub's, or `to` is none of these.
        MillpondError: the subscriber does not read the topic.
    """
    if rules.owner(topic) != "pubsub":
        raise ConfigError(f"{topic!r} is no pubsub topic by the rules in force")
    number = partition_of(topic, settings.kafka.partitions)
    partition = Partition(settings.app, "pubsub", number)
    async with StoreReader(rules.pool("pubsub")) as reader:
        key = reader_key(subscriber_named(subscriber), topic)
        reads = [ReadStates((key,), "windows"), ReadStates((topic,), "logs")]
        windows, logs = await reader.read(partition, reads)
        if windows[key] is None:
            raise MillpondError(
                f"{subscriber!r} has no read offset of {topic!r}: it has never read it, or has unsubscribed"
            )
        log = unpack_log(logs[topic])
        after = await _after(reader, partition, topic, to, log.last)
        # Within the log: what the index has before is somebody else's.
        after = min(max(after, log.cursor), log.last)
        (before,) = await reader.read(partition, [ReadLast(topic, after)])
        messages = await _count(reader, partition, topic, after)
    order = OperatorRewind(
        at=now_ms(), node=keys.AGENT_NODE, topic=topic, subscriber=subscriber,
        after=after, message_id=before[0][0] if before and before[0][1] > log.cursor else None,
    )  # fmt: skip
    return order, Place(after, messages)


async def _after(reader: StoreReader, partition: Partition, topic: str, to: str, last: int) -> int:
    if to == "earliest":
        return 0
    if to == "latest":
        return last
    (score,) = await reader.read(partition, [ReadEntry(topic, to)])
    if score is not None:
        return int(score) - 1
    try:
        at_s = datetime.fromisoformat(to).timestamp()
    except (ValueError, OverflowError) as error:  # either of the calendar's ends, as local time
        raise ConfigError(
            f"--to: {to!r} is neither earliest, latest, an ISO time nor the id of a message that {topic!r} has"
        ) from error
    return round(at_s * 1_000_000) - 1


async def _count(reader: StoreReader, partition: Partition, topic: str, after: int) -> int:
    count = 0
    while True:
        (entries,) = await reader.read(partition, [ReadIndex(topic, COUNTED_AT_ONCE, after)])
        count += len(entries)
        if len(entries) < COUNTED_AT_ONCE:
            return count
        after = entries[-1][1]
