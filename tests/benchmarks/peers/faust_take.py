"""The job in Faust as its documentation writes it: `take` and one redis-py pipeline for each batch."""

import os

import faust
from redis.asyncio import Redis

BATCH_EVENTS = 500
BATCH_WAIT_S = 0.1

redis = Redis.from_url(os.environ["BENCH_REDIS"])
app = faust.App(
    os.environ["BENCH_GROUP"],
    broker=f"kafka://{os.environ['BENCH_KAFKA']}",
    consumer_auto_offset_reset="earliest",
    topic_disable_leader=True,
    web_enabled=False,
)
topic = app.topic(os.environ["BENCH_TOPIC"], value_serializer="json")


@app.agent(topic)
async def store(stream: faust.StreamT) -> None:
    async for events in stream.take(BATCH_EVENTS, within=BATCH_WAIT_S):
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
    app.main()
