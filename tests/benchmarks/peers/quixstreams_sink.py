"""The job in Quix Streams: a batching sink, one redis-py pipeline for each batch."""

import os

from quixstreams import Application
from quixstreams.sinks import BatchingSink, SinkBatch
from redis import Redis

COMMIT_EVENTS = 5_000


class RedisSink(BatchingSink):
    def __init__(self) -> None:
        super().__init__()
        self._redis = Redis.from_url(os.environ["BENCH_REDIS"])

    def setup(self) -> None:
        self._redis.ping()

    def write(self, batch: SinkBatch) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for item in batch:
            event = item.value
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
        pipeline.execute()


def main() -> None:
    app = Application(
        broker_address=os.environ["BENCH_KAFKA"],
        consumer_group=os.environ["BENCH_GROUP"],
        auto_offset_reset="earliest",
        commit_every=COMMIT_EVENTS,
        auto_create_topics=False,
        loglevel="WARNING",
    )
    topic = app.topic(os.environ["BENCH_TOPIC"], value_deserializer="json")
    app.dataframe(topic).sink(RedisSink())
    app.run()


if __name__ == "__main__":
    main()
