"""`millpond kafka init` and `check`, against a real Kafka."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from millpond.pipeline.cli.main import app
from millpond.schemas import keys
from millpond.schemas.errors import ConfigError
from tests.support.servers import Server


def configured(directory: Path, kafka: Server, *settings: str) -> list[str]:
    """The --config option of a configuration with this Kafka."""
    config = directory / "millpond.toml"
    lines = ["[kafka]", f'bootstrap_servers = ["{kafka.address}"]', *settings]
    config.write_text("\n".join(lines))
    return ["--config", str(config)]


def test_topics_are_created_once_and_every_difference_is_named(
    own_kafka: Server, tmp_path: Path
) -> None:
    millpond = CliRunner()
    option = configured(tmp_path, own_kafka, "partitions = 3")

    missing = millpond.invoke(app, ["kafka", "check", *option])
    assert missing.exit_code == 1
    assert missing.stderr.splitlines() == [
        f"{topic} does not exist: run `millpond kafka init`" for topic in keys.TOPICS
    ]

    created = millpond.invoke(app, ["kafka", "init", *option])
    assert (created.exit_code, created.stdout) == (0, f"created {', '.join(keys.TOPICS)}\n")
    assert millpond.invoke(app, ["kafka", "check", *option]).exit_code == 0
    again = millpond.invoke(app, ["kafka", "init", *option])
    assert (again.exit_code, again.stdout) == (0, "all topics exist\n")

    other = configured(tmp_path, own_kafka, "partitions = 4", "retention_hours = 1")
    differing = millpond.invoke(app, ["kafka", "check", *other])
    assert differing.exit_code == 1
    assert sorted(differing.stderr.splitlines()) == sorted(
        line
        for topic in keys.TOPICS
        for line in (
            f"{topic}: partitions is 3, expected 4",
            f"{topic}: retention.ms is 604800000, expected 3600000",
        )
    )


def test_more_replicas_than_brokers_are_refused_with_kafkas_reason(
    own_kafka: Server, tmp_path: Path
) -> None:
    option = configured(tmp_path, own_kafka, "replication_factor = 3")
    refused = CliRunner().invoke(app, ["kafka", "init", *option])
    assert isinstance(refused.exception, ConfigError)
    assert "replication" in str(refused.exception).lower()


def test_a_prefix_that_kafka_cannot_tell_from_another_one_is_refused(
    own_kafka: Server, tmp_path: Path
) -> None:
    millpond = CliRunner()
    dotted = configured(tmp_path, own_kafka, "partitions = 1", 'topic_prefix = "plant.1."')
    created = millpond.invoke(app, ["kafka", "init", *dotted])
    assert created.exit_code == 0
    underlined = configured(tmp_path, own_kafka, "partitions = 1", 'topic_prefix = "plant_1."')
    refused = millpond.invoke(app, ["kafka", "init", *underlined])
    assert isinstance(refused.exception, ConfigError)
    assert "plant_1.mqtt.clients" in str(refused.exception)
