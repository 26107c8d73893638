"""The job in FastStream: a batch subscriber (aiokafka), one redis-py pipeline for each batch."""

import os
from typing import Any

import uvloop
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker
from redis.asyncio import Redis

BATCH_EVENTS = 2_000

redis = Redis.from_url(os.environ["BENCH_REDIS"])
# Without the validation of arguments by type, which would only cost: the events are plain dictionaries.
broker = KafkaBroker(os.environ["BENCH_KAFKA"], apply_types=False, logger=None)
app = FastStream(broker, logger=None)


@broker.subscriber(
    os.environ["BENCH_TOPIC"],
    group_id=os.environ["BENCH_GROUP"],
    batch=True,
    max_records=BATCH_EVENTS,
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.ACK,
)
async def store(events: list[dict[str, Any]]) -> None:
    pipeline = redis.pipeline(transaction=False)
    for event in events:
        if event["type"] != "message.published":
            continue
        message_id, name = event["message_id"], event["topic"]
        body = {
            "id": message_id,
            "from": event["client_id"],
            "qos": event["qos"],
            "topic": name,
            "payload": event["payload"],
            "ts": event["published_at"] // 1000,
            "retain": "true" if event["retain"] else "false",
        }
        pipeline.hset(f"mqtt:msg:{message_id}", mapping=body)
        pipeline.zadd(f"mqtt:msg:{name}", {message_id: event["published_at"] * 1000})
    await pipeline.execute()


if __name__ == "__main__":
    uvloop.run(app.run())
