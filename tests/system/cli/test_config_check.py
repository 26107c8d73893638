"""`millpond config check` with real servers: the table of rules, what would not run, and what weakens a guarantee."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from millpond.pipeline.cli.main import app
from millpond.pipeline.stack.ports import HOST, free_port
from tests.support import given
from tests.support.servers import Server

DOWN = "Kafka cannot be reached"
NONE = f"{HOST}:{free_port()}"  # where nothing listens


def checked(directory: Path, redis: str, *tables: str, kafka: str = "", pool: str = "") -> Result:
    """The result of the command for these rules on this Redis. Without `kafka` the default address has none."""
    config = directory / "millpond.toml"
    servers = f'[kafka]\nbootstrap_servers = ["{kafka}"]\n' if kafka else ""
    config.write_text(f'{servers}[pool.pool1]\nserver = "{redis}"\n{pool}' + "".join(tables))
    return check(config)


def check(config: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["config", "check", "--config", str(config), *options])


def notes(result: Result) -> list[str]:
    """Its notes, without the one about a single broker. Nothing else is wrong."""
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "the configuration is valid"
    lines = [line for line in result.output.splitlines() if line.startswith("note: ")]
    return [line for line in lines if "min_insync_replicas" not in line]


def faults(result: Result) -> list[str]:
    """Its errors. They are the last lines."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.output.splitlines()[-1] == lines[-1]
    return lines


def test_each_rule_is_shown_with_the_agents_that_run_it(own_redis: Server, tmp_path: Path) -> None:
    address = own_redis.address.removeprefix("redis://")
    result = checked(tmp_path, address, given.store("a/#", expired_time=60), kafka=NONE)
    row = next(line for line in result.output.splitlines() if "on_message_publish" in line)
    assert row.split() == ["message.publish", "a/#", "on_message_publish", "60", "s", "messages"]


def test_each_setting_with_which_redis_loses_data_is_a_note(
    own_redis: Server, own_kafka: Server, tmp_path: Path
) -> None:
    kafka, address = own_kafka.address, own_redis.address.removeprefix("redis://")
    assert "does not exist" in faults(checked(tmp_path, address, given.store(), kafka=kafka))[0]
    made = CliRunner().invoke(app, ["kafka", "init", "--config", str(tmp_path / "millpond.toml")])
    assert made.exit_code == 0
    assert notes(checked(tmp_path, address, given.store(expired_time=60), kafka=kafka)) == []
    with Redis.from_url(own_redis.address) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        redis.config_set("appendonly", "no")
        redis.config_set("save", "")
        redis.config_set("hash-max-listpack-value", "64")
    found = notes(checked(tmp_path, address, given.store(expired_time=60), kafka=kafka))
    named = [note.removeprefix("note: [pool.pool1] ") for note in found]
    assert [reason.partition(":")[0] for reason in named] == [
        "maxmemory-policy is allkeys-lru",
        "appendonly is no, nothing on disk",
        "hash-max-listpack-value is 64",
    ]
    config = tmp_path / "millpond.toml"
    config.write_text(config.read_text().replace("[kafka]", "[kafka]\npartitions = 5"))
    assert all("partitions is 24, expected 5" in line for line in faults(check(config)))


def test_a_server_that_refuses_config_get_is_a_note(own_redis: Server, tmp_path: Path) -> None:
    with Redis.from_url(own_redis.address) as redis:
        redis.execute_command("ACL", "SETUSER", "default", "-config")
    result = checked(
        tmp_path, own_redis.address.removeprefix("redis://"), given.store(), kafka=NONE
    )
    assert "CONFIG GET is not allowed" in result.output
    assert len(faults(result)) == 1


def test_servers_that_do_not_answer_are_errors(tmp_path: Path) -> None:
    kafka, redis = faults(checked(tmp_path, f"{HOST}:{free_port()}", given.store(), kafka=NONE))
    assert kafka.startswith(f"error: {DOWN}")
    assert redis.startswith("error: [pool.pool1] cannot connect")


def test_offline_asks_no_server_and_reads_no_file(tmp_path: Path) -> None:
    checked(tmp_path, NONE, given.store(), kafka=NONE, pool='password_file = "/nowhere"\n')
    result = check(tmp_path / "millpond.toml", "--offline")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "the configuration is valid"
    assert "note:" not in result.output


def test_files_that_cannot_be_read_are_errors(own_redis: Server, tmp_path: Path) -> None:
    tables = (
        '[bridge]\napi_key_file = "/nowhere/key"\n',
        '[web]\ntoken_file = "/nowhere/token"\n',
    )
    result = checked(
        tmp_path,
        own_redis.address.removeprefix("redis://"),
        *tables,
        kafka=NONE + '"]\nsecurity_protocol = "SSL"\nca_file = "/nowhere/ca" # ',
        pool='password_file = "/nowhere/word"\n',
    )
    found = faults(result)
    assert [line.partition(":")[2].partition(":")[0].strip() for line in found] == [
        "[bridge] api_key_file",
        "[web] token_file",
        "[kafka] ca_file, certificate_file, key_file",
        "[pool.pool1] password_file",
    ]


@pytest.mark.parametrize(
    ("acl", "pool", "reason"),
    [
        (["on", ">word", "~*", "&*", "+@all"], 'password = "wrong"', "WRONGPASS"),
        (["on", ">word", "~*", "&*", "+@all"], 'password = "word"\ndatabase = 99', "out of range"),
        (["on", ">word", "~mqtt:*", "&*", "+@all"], 'password = "word"', "access a key"),
        (["on", ">word", "~millpond:*", "&*", "+@all"], 'password = "word"', "HSET mqtt:msg:"),
        (["on", ">word", "~*", "&*", "+@all", "-zadd"], 'password = "word"', "ZADD"),
        (["on", ">word", "~*", "&other", "+@all"], 'password = "word"', "SUBSCRIBE mqtt_channel"),
    ],
)
def test_what_redis_would_refuse_is_found_by_trying(
    own_redis: Server, tmp_path: Path, acl: list[str], pool: str, reason: str
) -> None:
    with Redis.from_url(own_redis.address) as redis:
        redis.execute_command("ACL", "SETUSER", "mill", "reset", *acl)
        result = checked(
            tmp_path,
            own_redis.address.removeprefix("redis://"),
            given.store(),
            kafka=NONE,
            pool=f'username = "mill"\n{pool}\n',
        )
        refused = [line for line in faults(result) if DOWN not in line]
        assert refused
        assert all(line.startswith("error: [pool.pool1] ") for line in refused)
        assert any(reason in line for line in refused), refused
        assert redis.dbsize() == 0


def test_a_user_without_administration_is_no_error(own_redis: Server, tmp_path: Path) -> None:
    with Redis.from_url(own_redis.address) as redis:
        rules = ["on", ">word", "~mqtt:*", "~millpond:*", "&mqtt_channel", "+@all", "-@admin"]
        redis.execute_command("ACL", "SETUSER", "mill", "reset", *rules, "-@dangerous")
    user = 'username = "mill"\npassword = "word"\n'
    address = own_redis.address.removeprefix("redis://")
    result = checked(tmp_path, address, given.store(), given.queue(), kafka=NONE, pool=user)
    (only,) = faults(result)
    assert DOWN in only


def test_commands_that_the_server_does_not_know_are_errors_with_their_lines(
    own_redis: Server, tmp_path: Path
) -> None:
    address = own_redis.address.removeprefix("redis://")
    commands = given.command("GRIND ${msgid}"), given.command("INCR")
    _, first, second = faults(checked(tmp_path, address, *commands, kafka=NONE))
    assert first.startswith(f"error: {tmp_path / 'millpond.toml'}:")
    assert "GRIND" in first
    assert "INCR takes" in second
