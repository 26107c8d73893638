"""A wrong option, or a `--data` without a stack, ends with exit code 2 and one sentence or the usage."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from millpond.pipeline.cli.main import app
from millpond.schemas.errors import ConfigError


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--mqtt-port", "99999999"],
        ["up", "--web-port", "-1"],
        ["up", "--data", "/etc/passwd"],
        ["status", "--data", "/etc/passwd"],
        ["down", "--data", "/etc/passwd"],
        ["logs", "--data", "/etc/passwd"],
        ["pub", "-t", "a", "-p", "99999999"],
        ["redis"],
    ],
)
def test_a_wrong_option_shows_the_usage(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.exception
    assert "Usage:" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["pub", "-t", "a", "-m", "b"], ["sub", "-t", "a"], ["redis", "PING"], ["lag"], ["logs"]],
)
def test_a_data_directory_without_a_stack_is_an_error(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == (
        f"--data: {tmp_path} holds no stack: `millpond up --data {tmp_path}` makes one"
    )


@pytest.mark.parametrize("servers", ["oats", "oats:barley", "", "a:1,b"])
def test_a_kafka_address_without_a_port_is_an_error(
    servers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLPOND_KAFKA_BOOTSTRAP_SERVERS", servers)
    done = CliRunner().invoke(app, ["kafka", "check"])
    assert isinstance(done.exception, ConfigError)
    assert "MILLPOND_KAFKA_BOOTSTRAP_SERVERS" in str(done.exception)


def test_logs_shows_the_last_lines_of_each_log(tmp_path: Path) -> None:
    (tmp_path / "stack.toml").touch()
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "worker-queue.log").write_text("one\ntwo\nthree\nunfinished")
    (tmp_path / "log" / "up.log").write_text("ready\n")

    def said(*arguments: str) -> list[str]:
        done = CliRunner().invoke(app, ["logs", "--data", str(tmp_path), *arguments])
        assert done.exit_code == 0, done.exception
        return done.stdout.splitlines()

    assert said("-n", "2") == ["up           | ready", "worker-queue | two", "worker-queue | three"]
    assert said("worker queue", "-n", "1") == ["three"]
    unknown = CliRunner().invoke(app, ["logs", "kafka", "--data", str(tmp_path)])
    assert str(unknown.exception) == "no log of 'kafka': there are up, worker-queue"
