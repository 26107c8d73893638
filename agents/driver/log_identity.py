"""Check that the state in the store was folded from the log that Kafka has now."""

from __future__ import annotations

from millpond.agents.ports import Applied, Log, LogBounds
from millpond.schemas.errors import LogMismatch
from millpond.schemas.keys import Partition


async def check_log_identity(
    partition: Partition, applied: Applied | None, bounds: LogBounds, log: Log
) -> None:
    """Compare the fence with Kafka's cluster, topic and record at the applied offset.

    Raises:
        LogMismatch: the state belongs to another log; the message names both sides.
    """
    if applied is None:
        return
    state = f"the store holds the state of {partition}"
    if applied.cluster_id != bounds.cluster_id:
        raise LogMismatch(
            f"{state} of Kafka cluster {applied.cluster_id}, but this is cluster {bounds.cluster_id}"
        )
    if applied.partition_count != bounds.partition_count:
        raise LogMismatch(
            f"{state} of a topic with {applied.partition_count} partitions, but it has"
            f" {bounds.partition_count}: a topic's partition count must never change"
        )
    if applied.offset >= bounds.end:
        raise LogMismatch(
            f"{state} up to offset {applied.offset}, but the log ends before {bounds.end}:"
            " was the topic deleted and created again?"
        )
    # Retention may have removed the record. Then there is nothing to compare, and the log may continue the state.
    async for run in log.read(partition, applied.offset, applied.offset + 1):
        for record in run:
            if record.timestamp != applied.timestamp:
                raise LogMismatch(
                    f"{state} up to offset {applied.offset} of {applied.timestamp} ms, but the log's"
                    f" record there is of {record.timestamp} ms: was the topic deleted and created again?"
                )
