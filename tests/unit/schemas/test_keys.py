"""Names of topics, groups and keys. They are golden: other programs and stored data rely on them."""

from __future__ import annotations

import re

import pytest
from redis.crc import key_slot

from millpond.schemas import keys
from millpond.schemas.keys import Partition
from tests.unit.schemas.test_codec import GOLDEN

PARTITION = Partition("mill", "queue", 7)


def test_keys_have_their_documented_names() -> None:
    assert keys.message_index("a/b") == "mqtt:msg:a/b"
    assert keys.message_body("0005") == "mqtt:msg:0005"
    assert keys.retained("a/b") == "mqtt:retain:a/b"
    assert keys.receipt("0005") == "mqtt:receipt:0005"
    assert keys.applied(PARTITION) == "millpond:{mill:queue:7}:applied"
    assert keys.journal(PARTITION) == "millpond:{mill:queue:7}:journal"
    assert keys.removal_field(12) == "remove:12"
    assert keys.rules(PARTITION) == "millpond:{mill:queue:7}:rules"
    assert keys.seen(PARTITION, 0) == "millpond:{mill:queue:7}:seen:0"
    assert keys.seen(PARTITION, 3) == "millpond:{mill:queue:7}:seen:1"
    assert keys.presence("c") == "mqtt:client:c"
    assert keys.node("n@1") == "mqtt:node:n@1"
    assert keys.subscriptions("c") == "mqtt:sub:c"
    assert keys.table(PARTITION, "states") == "millpond:{mill:queue:7}:states"
    assert keys.index(PARTITION, keys.RETAINED_INDEX) == "millpond:{mill:queue:7}:retained"
    assert keys.index(PARTITION, "announced") == "millpond:{mill:queue:7}:announced"
    assert keys.due(PARTITION) == "millpond:{mill:queue:7}:due"
    assert keys.private_prefix("mill", "queue") == "millpond:{mill:queue:"
    assert keys.replay_marker("mill", "queue") == "millpond:{mill:queue}:replay"
    assert keys.rebuild_marker("mill", "queue") == "millpond:{mill:queue}:rebuild"
    assert keys.probe("mill") == "millpond:{mill}:probe"


def test_a_consumer_group_names_its_application() -> None:
    for agent in keys.SOURCE_TOPIC:
        assert keys.app_of_group(keys.group_id("my.app", agent)) == "my.app"
    assert keys.app_of_group(keys.bridge_group_id("mill")) == "mill"
    # These read no topics of ours.
    for other in (keys.rule_events_group_id("mill"), "messages", ".queue", "mill.other", ""):
        assert keys.app_of_group(other) is None


def test_every_built_key_has_a_row_in_the_table() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", keys.__doc__ or "", re.MULTILINE)
    patterns = [
        re.compile(re.sub(r"\\\{[a-z_:]+\\\}|\\\{0,1\\\}", "[^:]+", re.escape(row))) for row in rows
    ]
    built = [
        *(keys.message_index("t"), keys.message_body("m"), keys.retained("t"), keys.receipt("m")),
        *(keys.applied(PARTITION), keys.journal(PARTITION), keys.rules(PARTITION)),
        *(keys.seen(PARTITION, 1), keys.table(PARTITION, "states"), keys.due(PARTITION)),
        *(
            keys.index(PARTITION, keys.RETAINED_INDEX),
            keys.presence("c"),
            keys.node("n"),
            keys.subscriptions("c"),
        ),
    ]
    for key in built:
        shown = key.replace(
            "{mill:queue:7}", "mill"
        )  # {app:agent:partition} is one placeholder of the table
        assert any(pattern.fullmatch(shown) for pattern in patterns), key


def test_private_keys_of_a_partition_share_one_hash_tag() -> None:
    private = [
        *(key(PARTITION) for key in (keys.applied, keys.journal, keys.rules, keys.due)),
        *(keys.table(PARTITION, "states"), keys.index(PARTITION, "waiting")),
    ]
    assert {key.partition("{")[2].partition("}")[0] for key in private} == {"mill:queue:7"}
    assert all(key.startswith(keys.PRIVATE_PREFIX) for key in private)


def test_a_partition_names_its_topic_and_its_consumer_group() -> None:
    assert PARTITION.topic == keys.MESSAGES_TOPIC
    assert Partition("mill", "sessions", 0).topic == keys.CLIENTS_TOPIC
    assert str(PARTITION) == "mqtt.messages[7] (mill.queue)"
    assert keys.group_id("mill", "queue") == "mill.queue"
    assert keys.bridge_group_id("mill") == "mill.bridge"
    assert keys.rule_events_group_id("mill") == "mill.bridge.emqx-kafka"


KEYS = {
    "message.published": "queue/a",
    "message.retained": "queue/a",
    "message.delivered": "queue/a",
    "message.acked": "queue/a",
    "node.started": "$millpond/sessions",
    "node.stopped": "$millpond/sessions",
    "node.sync.started": "$millpond/sessions",
    "node.sync.completed": "$millpond/sessions",
    "subscriber.joined": "queue/+",
    "subscriber.left": "queue/a",
    "deliveries.sent": "$millpond/queue",
    "delivery.failed": "$millpond/queue",
    "members.active": "$millpond/pubsub",
    "operator.requeue": "queue/a",
    "operator.drop": "queue/a",
    "operator.rewind": "pubsub/a",
    "rules.changed": "$millpond/queue",
    "tick": "$millpond/queue",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_key_of_a_record_is_a_topic_a_client_id_or_an_agent(name: str) -> None:
    event, _ = GOLDEN[name]
    assert keys.record_key(event) == KEYS.get(name, "sub")


def test_the_key_in_front_of_a_wait_lies_in_the_slot_of_its_number() -> None:
    assert keys.confirmed(17) == "millpond:{17}:confirmed"
    assert key_slot(keys.confirmed(17).encode()) == key_slot(b"17")
