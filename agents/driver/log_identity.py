"""Whether the state in the store belongs to the log in front of us."""

from __future__ import annotations

from millpond.agents.ports import Applied, Log, LogBounds
from millpond.schemas.errors import LogMismatch
from millpond.schemas.keys import Partition


async def compare(
    partition: Partition, applied: Applied | None, bounds: LogBounds, log: Log
) -> None:
    """Refuse to go on from an applied offset of another cluster, another topic or another past.

    Raises:
        LogMismatch: names what the store holds and what Kafka has.
    """
    if applied is None:
        return
    held = f"the store holds the state of {partition}"
    if applied.cluster_id != bounds.cluster_id:
        raise LogMismatch(
            f"{held} of Kafka cluster {applied.cluster_id}, but this is cluster {bounds.cluster_id}"
        )
    if applied.partition_count != bounds.partition_count:
        raise LogMismatch(
            f"{held} of a topic with {applied.partition_count} partitions, but it has"
            f" {bounds.partition_count}: the partition count is for life"
        )
    if applied.offset >= bounds.end:
        raise LogMismatch(
            f"{held} up to offset {applied.offset}, but the log ends before {bounds.end}:"
            " was the topic made anew?"
        )
    async for run in log.read(partition, applied.offset, applied.offset + 1):
        for record in run:
            if record.timestamp != applied.timestamp:
                raise LogMismatch(
                    f"{held} up to offset {applied.offset} of {applied.timestamp} ms, but the log's"
                    f" record there is of {record.timestamp} ms: was the topic made anew?"
                )
