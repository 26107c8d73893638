"""How far the agents are behind: records in Kafka that a consumer group has not committed yet."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer, TopicPartition

from pipeline.settings import KafkaSettings
from schemas import keys
from schemas.events import AgentName


async def lag(settings: KafkaSettings, app: str, agent: AgentName) -> int:
    """Records of all partitions together; what retention dropped does not count."""
    consumer = AIOKafkaConsumer(
        group_id=keys.group_id(app, agent), enable_auto_commit=False, **settings.client_options()
    )
    await consumer.start()
    try:
        topic = keys.SOURCE_TOPIC[agent]
        await consumer._client.force_metadata_update()  # noqa: SLF001  no public call does it
        numbers = consumer.partitions_for_topic(topic) or set()
        partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
        if not partitions:
            return 0
        starts = await consumer.beginning_offsets(partitions)
        ends = await consumer.end_offsets(partitions)
        behind = 0
        for partition in partitions:
            committed = await consumer.committed(partition)
            behind += ends[partition] - max(starts[partition], committed or 0)
        return behind
    finally:
        await consumer.stop()
