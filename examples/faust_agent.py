"""Print alarms: a plain Faust agent that reads the same Kafka topic as Millpond's workers.

    cd examples && KAFKA=kafka://127.0.0.1:9092 faust -A faust_agent worker --without-web

An alarm is a message below `sensor/` whose payload is a number above the threshold. The agent uses Faust's own
transport. After a worker joins or leaves, Faust can repeat records that were not committed, so an alarm can come twice.
"""

from __future__ import annotations

import json
import os
import sys

import faust
from faust.types import StreamT

THRESHOLD = 100.0

app = faust.App(
    "alarms",  # the consumer group: several processes share its partitions
    broker=os.environ.get("KAFKA", "kafka://127.0.0.1:9092"),
    topic_allow_declare=False,  # `millpond kafka init` creates the topics
    topic_disable_leader=True,  # this agent needs no leader topic
    table_standby_replicas=0,  # no tables, so no standbys; all workers of a group need the same value
    broker_session_timeout=12.0,  # s until the partitions of a dead worker move; Faust's default is 60
)
# Raw bytes, because a record that Faust cannot decode stops the agent. Millpond makes dead letters of such records.
messages = app.topic("mqtt.messages", key_serializer="raw", value_serializer="raw")


@app.agent(messages)
async def alarms(records: StreamT[bytes | None]) -> None:
    """Print a line for each alarm."""
    async for record in records:
        try:
            event = json.loads(record or b"{}")
            # The topic also has deliveries, acknowledgements and Millpond's own records.
            if event.get("type") == "message.published" and event["topic"].startswith("sensor/"):
                value = float(event["payload"])
                if value > THRESHOLD:
                    # Faust's worker redirects sys.stdout to its log. This is the real one.
                    print(f"{event['topic']} is at {value:g}", file=sys.__stdout__, flush=True)
        except (ValueError, AttributeError):
            continue  # the record is no JSON object, or the payload is no number
