"""`millpond config check` with real servers: the table of rules, and notes on what weakens a guarantee."""

from __future__ import annotations

from pathlib import Path

from redis import Redis
from typer.testing import CliRunner, Result

from millpond.pipeline.cli.main import app
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.schemas.errors import ConfigError
from tests.support import given
from tests.support.servers import Server


def checked(directory: Path, redis: str, *tables: str, kafka: str = "") -> Result:
    """The result of the command for these rules on this Redis."""
    config = directory / "millpond.toml"
    kafka = kafka or f"{HOST}:{free_port()}"
    config.write_text(
        f'[kafka]\nbootstrap_servers = ["{kafka}"]\n[pool.pool1]\nserver = "{redis}"\n'
        + "".join(tables)
    )
    return CliRunner().invoke(app, ["config", "check", "--config", str(config)])


def notes(result: Result) -> list[str]:
    """Its notes, without the one about a single broker."""
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "the configuration is valid"
    lines = [line for line in result.output.splitlines() if line.startswith("note: ")]
    return [line for line in lines if "min_insync_replicas" not in line]


def test_each_rule_is_shown_with_the_agents_that_run_it(own_redis: Server, tmp_path: Path) -> None:
    address = own_redis.address.removeprefix("redis://")
    result = checked(tmp_path, address, given.store("a/#", expired_time=60))
    row = next(line for line in result.output.splitlines() if "on_message_publish" in line)
    assert row.split() == ["message.publish", "a/#", "on_message_publish", "60", "s", "messages"]


def test_each_setting_with_which_redis_loses_data_is_a_note(
    own_redis: Server, tmp_path: Path
) -> None:
    address = own_redis.address.removeprefix("redis://")
    kafka = "Kafka cannot be reached"
    (only,) = notes(checked(tmp_path, address, given.store(expired_time=60)))
    assert kafka in only
    with Redis.from_url(own_redis.address) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        redis.config_set("appendonly", "no")
        redis.config_set("save", "")
        redis.config_set("hash-max-listpack-value", "64")
    found = notes(checked(tmp_path, address, given.store(expired_time=60)))
    named = [note.removeprefix("note: [pool.pool1] ") for note in found if kafka not in note]
    assert [reason.partition(":")[0] for reason in named] == [
        "maxmemory-policy is allkeys-lru",
        "appendonly is no, nothing on disk",
        "hash-max-listpack-value is 64",
    ]


def test_a_server_that_refuses_config_get_is_a_note(own_redis: Server, tmp_path: Path) -> None:
    with Redis.from_url(own_redis.address) as redis:
        redis.execute_command("ACL", "SETUSER", "default", "-config")
    found = notes(checked(tmp_path, own_redis.address.removeprefix("redis://"), given.store()))
    assert any("CONFIG GET is not allowed" in note for note in found)


def test_servers_that_do_not_answer_are_notes(tmp_path: Path) -> None:
    found = notes(checked(tmp_path, f"{HOST}:{free_port()}", given.store()))
    assert any("Kafka cannot be reached" in note for note in found)
    assert any("[pool.pool1] cannot connect" in note for note in found)


def test_a_command_that_the_server_does_not_know_is_an_error_with_its_line(
    own_redis: Server, tmp_path: Path
) -> None:
    address = own_redis.address.removeprefix("redis://")
    result = checked(tmp_path, address, given.command("GRIND ${msgid}"))
    assert isinstance(result.exception, ConfigError)
    assert "GRIND" in str(result.exception)
    assert f"{tmp_path / 'millpond.toml'}:" in str(result.exception)
