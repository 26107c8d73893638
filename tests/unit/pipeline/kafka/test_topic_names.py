"""Topics have one name inside Millpond, and another in Kafka. Few modules know the second."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from millpond.pipeline.kafka import topics
from millpond.pipeline.settings import KafkaSettings
from millpond.schemas import keys

ROOT = Path(__file__).parents[4]
SHIPPED = [path for package in ("schemas", "agents", "pipeline") for path in (ROOT / package).rglob("*.py")]  # fmt: skip

BORDER = {
    "pipeline/settings.py",
    "pipeline/kafka/producer.py",
    "pipeline/kafka/log.py",
    "pipeline/kafka/range_reader.py",
    "pipeline/kafka/topics.py",
    "pipeline/worker/worker.py",
    "pipeline/brokers/commands/consumer.py",
    "pipeline/operate/lag.py",
    "pipeline/kafka/log_reader.py",
    "pipeline/replay/folding.py",
    "pipeline/replay/log_extent.py",
}
# They take names in Kafka from a module of the border, or from Kafka itself.
GIVEN = {
    "pipeline/kafka/consumer.py": "the topics of its caller; one caller has those of EMQX's sinks",
    "pipeline/replay/log.py": "the topic that `Folding` names",
    "pipeline/worker/faust_transport.py": "the partitions that Kafka assigns",
}
# What names a topic to Kafka.
OF_KAFKA = {"TopicPartition", "NewTopic", "ConfigResource", "TP", "describe_topics", "app.topic"}


def used(path: Path) -> set[str]:
    """The names that a module uses, and its attributes, alone and behind their object."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node)}
    return found


def test_no_module_outside_the_border_names_a_topic_as_kafka_does() -> None:
    named = {str(path.relative_to(ROOT)): used(path) for path in SHIPPED}
    calling = {name for name, words in named.items() if words & {"topic_name", "topic_prefix"}}
    assert calling == BORDER
    naming = {name for name, words in named.items() if words & OF_KAFKA}
    assert naming <= BORDER | GIVEN.keys()
    assert GIVEN.keys() <= naming


@pytest.mark.parametrize(("prefix", "expected"), [("", "mqtt."), ("plant1.", "plant1.mqtt.")])
def test_every_topic_has_the_prefix_in_kafka(prefix: str, expected: str) -> None:
    names = topics.names(KafkaSettings(topic_prefix=prefix))
    assert names == [topic.replace("mqtt.", expected) for topic in keys.TOPICS]
