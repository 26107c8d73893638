"""Alarms on stdout: a plain Faust agent, with Faust's own transport, beside Millpond on the same topic.

    cd examples && KAFKA=kafka://127.0.0.1:9092 faust -A faust_agent worker --without-web

A message published to `sensor/#` whose payload is a number above the threshold is an alarm. Expect one twice now
and then: after a worker joins or leaves, Faust hands over again what it had not committed.
"""

from __future__ import annotations

import json
import os
import sys

import faust
from faust.types import StreamT

THRESHOLD = 100.0

app = faust.App(
    "alarms",  # the consumer group: start more of these and they share the partitions
    broker=os.environ.get("KAFKA", "kafka://127.0.0.1:9092"),
    topic_allow_declare=False,  # `millpond kafka init` makes the topics
    topic_disable_leader=True,  # nor does Faust make one of its own
    table_standby_replicas=0,  # no tables, no standbys; has to be the same in all workers of a group
    broker_session_timeout=12.0,  # how long a worker that died keeps its partitions; Faust's own is a minute
)
# Raw bytes: what Faust cannot decode stops the agent, what we cannot decode we leave to Millpond's dead letters.
messages = app.topic("mqtt.messages", key_serializer="raw", value_serializer="raw")


@app.agent(messages)
async def alarms(records: StreamT[bytes | None]) -> None:
    """Print a line for each alarm."""
    async for record in records:
        try:
            event = json.loads(record or b"{}")
            # Deliveries, acknowledgements and Millpond's own ticks come along the same way.
            if event.get("type") == "message.published" and event["topic"].startswith("sensor/"):
                value = float(event["payload"])
                if value > THRESHOLD:
                    # The real stdout: the other one Faust's worker turns into its log.
                    print(f"{event['topic']} is at {value:g}", file=sys.__stdout__, flush=True)
        except (ValueError, AttributeError):
            continue  # no JSON, no object, or no number
