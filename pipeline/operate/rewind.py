"""Where a rewound subscriber of a pubsub topic reads on, computed from the topic's index in the store."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from millpond.agents.pubsub.state import reader_key, subscriber_named, unpack_log
from millpond.agents.reads import ReadEntry, ReadIndex, ReadLast, ReadStates
from millpond.pipeline.clock import now_ms
from millpond.pipeline.kafka.partitioning import partition_of
from millpond.pipeline.settings import Settings
from millpond.pipeline.stores.redis.reader import StoreReader
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import OperatorRewind
from millpond.schemas.keys import Partition
from millpond.schemas.rules import Rules

COUNTED_AT_ONCE: Final = 10_000  # entries of the index in one read


class Place(NamedTuple):
    """The score after which the subscriber reads on, and how many messages the index has after it now."""

    after: int
    messages: int


async def find_place(
    settings: Settings, rules: Rules, subscriber: str, topic: str, to: str
) -> tuple[OperatorRewind, Place]:
    """Make the order to rewind, and the place that it leads to.

    `to` is `earliest`, `latest`, an ISO time or a message id. A time without a zone is in this machine's zone. The
    subscriber gets again what was published at that time or later, or from that message on.

    Raises:
        ConfigError: the pubsub agent does not own the topic, or `to` is none of the above.
        MillpondError: the subscriber has no read offset of the topic.
    """
    if rules.owner(topic) != "pubsub":
        raise ConfigError(f"{topic!r} is no pubsub topic by the configured rules")
    number = partition_of(topic, settings.kafka.partitions)
    partition = Partition(settings.app, "pubsub", number)
    async with StoreReader(rules.pool("pubsub")) as reader:
        key = reader_key(subscriber_named(subscriber), topic)
        reads = [ReadStates((key,), "windows"), ReadStates((topic,), "logs")]
        windows, logs = await reader.read(partition, reads)
        if windows[key] is None:
            raise MillpondError(
                f"{subscriber!r} has no read offset of {topic!r}: it never read the topic, or has unsubscribed"
            )
        log = unpack_log(logs[topic])
        after = await _after(reader, partition, topic, to, log.last)
        # Other programs may have put entries into the index below the log. The subscriber must not read them.
        after = min(max(after, log.cursor), log.last)
        (before,) = await reader.read(partition, [ReadLast(topic, after)])
        messages = await _count(reader, partition, topic, after)
        _check(reader)
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
    _check(reader)
    if score is not None:
        return int(score) - 1
    try:
        at_s = datetime.fromisoformat(to).timestamp()
    except (
        ValueError,
        OverflowError,
    ) as error:  # OverflowError: a local time at either end of the calendar
        raise ConfigError(
            f"--to: {to!r} is not earliest, latest, an ISO time, or the id of a stored message of {topic!r}"
        ) from error
    return round(at_s * 1_000_000) - 1


def _check(reader: StoreReader) -> None:
    """Refuse to compute a place from a key that counts as empty.

    Raises:
        MillpondError: the topic's index has another type.
    """
    if reader.foreign_keys:
        raise MillpondError(next(iter(reader.foreign_keys.values())))


async def _count(reader: StoreReader, partition: Partition, topic: str, after: int) -> int:
    count = 0
    while True:
        (entries,) = await reader.read(partition, [ReadIndex(topic, COUNTED_AT_ONCE, after)])
        count += len(entries)
        if len(entries) < COUNTED_AT_ONCE:
            return count
        after = entries[-1][1]
