"""`millpond up`, `down` and `status`: a stack is started, used, damaged and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from millpond.agents.registry import AGENT_NAMES
from millpond.pipeline.stack.directory import ChildState, DataDirectory, StackState
from millpond.pipeline.stack.ports import HOST, free_port
from millpond.pipeline.stack.processes import Process, identify
from millpond.pipeline.stack.stack import down
from tests.support.scraping import get
from tests.support.servers import Server

WORKERS = [f"worker {agent}" for agent in AGENT_NAMES]
WAIT_S = 120.0  # for a condition that comes true; generous, since machines are shared
MILLPOND = (sys.executable, "-m", "millpond")
OPTIONS = ("--mqtt-port", "--websocket-port", "--kafka-port", "--redis-port", "--web-port")
FREE_PORTS = tuple(argument for option in OPTIONS for argument in (option, "0"))
TOPIC = "sensors/kitchen"


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for the condition's first true answer."""
    deadline = time.monotonic() + WAIT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for: {what}"
        time.sleep(0.1)
    return answer


class Home:
    """One `--data` directory, and the commands that use it."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*MILLPOND, command, "--data", str(self.data), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )

    def says(self, command: str, *arguments: str) -> str:
        """The output of a command, which must succeed."""
        done = self.run(command, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return status

    def pids(self) -> dict[str, int]:
        return {process["name"]: process["pid"] for process in self.status()["processes"]}

    def stored(self) -> list[str]:
        """The payloads that Redis stores of the topic, in order."""
        ids = self.says("redis", "ZRANGE", f"mqtt:msg:{TOPIC}", "0", "-1").split()
        return [
            self.says("redis", "HGET", f"mqtt:msg:{identifier}", "payload").strip()
            for identifier in ids
        ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A running stack with its own Kafka and Redis."""
    home = Home(tmp_path_factory.mktemp("home") / "data")
    said = home.says("up", "--detach", *FREE_PORTS)
    assert said.splitlines()[-1] == "millpond is ready"
    try:
        yield home
    finally:
        home.run("down")


def test_up_prints_addresses_three_commands_to_try_and_a_ready_line(home: Home) -> None:
    lines = (home.data / "log" / "up.log").read_text().splitlines()
    assert lines[-1] == "millpond is ready"
    commands = [line.split() for line in lines[-4:-1]]
    assert [command[1] for command in commands] == ["pub", "redis", "status"]
    assert {Path(command[0]).name for command in commands} == {"millpond"}
    for address in home.status()["addresses"].values():
        assert any(address in line for line in lines)


def test_the_commands_to_try_work_as_printed(home: Home) -> None:
    lines = (home.data / "log" / "up.log").read_text().splitlines()
    publish, read, status = (line.split()[1:] for line in lines[-4:-1])
    subprocess.run([*MILLPOND, *publish], check=True)

    def stored() -> str:
        return subprocess.run([*MILLPOND, *read], capture_output=True, text=True, check=True).stdout

    until(lambda: len(stored().split()) >= 2, "the message and its score")
    subprocess.run([*MILLPOND, *status], capture_output=True, check=True)


def test_status_shows_addresses_processes_readiness_and_lag(home: Home) -> None:
    found = home.status()
    assert found["ready"]
    names = [process["name"] for process in found["processes"]]
    assert names == ["kafka", "redis", "bridge embedded", *WORKERS, "web"]
    for process in found["processes"]:
        assert process["ready"]
        assert psutil.pid_exists(process["pid"])
    until(
        lambda: home.status()["uncommitted"] == dict.fromkeys(AGENT_NAMES, 0),
        "the workers to have caught up",
    )
    table = home.says("status")
    assert all(name in table for name in names)


def test_each_process_of_ours_has_metrics_and_health_at_the_address_in_status(
    home: Home,
) -> None:
    addresses = {process["name"]: process["telemetry"] for process in home.status()["processes"]}
    assert addresses["kafka"] is None
    ours = [addresses[name] for name in ("bridge embedded", *WORKERS)]
    assert len(set(ours)) == len(ours)
    for address in ours:
        assert get(f"{address}/readyz")[0] == 200
        assert "\nmillpond_build_info{" in get(f"{address}/metrics")[1]


def test_everything_listens_on_loopback_only(home: Home) -> None:
    state = DataDirectory(home.data).read_state()
    assert state is not None
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process(state.supervisor.pid).children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    assert set(listening) == {HOST}


def test_the_command_line_of_a_process_names_its_part(home: Home) -> None:
    command = psutil.Process(home.pids()["worker messages"]).cmdline()
    assert " worker messages " in " ".join(command)


def test_published_lines_arrive_at_a_subscriber(home: Home) -> None:
    subscriber = subprocess.Popen(
        [*MILLPOND, "sub", "--data", str(home.data), "-t", "lines/#", "-v", "--count", "2"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        # A publish before the subscription is not received, so it is repeated.
        while subscriber.poll() is None:
            subprocess.run(
                [*MILLPOND, "pub", "--data", str(home.data), "-t", "lines/a", "--lines", "-q", "1"],
                input="one\ntwo\n",
                text=True,
                check=True,
            )
        said, _ = subscriber.communicate(timeout=WAIT_S)
    finally:
        subscriber.kill()
    assert sorted(said.splitlines()) == ["lines/a one", "lines/a two"]


def test_a_second_up_in_the_same_directory_is_refused(home: Home) -> None:
    done = home.run("up", *FREE_PORTS)
    assert done.returncode == 2
    assert "already runs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_child_that_ends_is_reported_and_restarted(home: Home) -> None:
    for name in ("worker messages", "redis"):
        pid = home.pids()[name]
        os.kill(pid, signal.SIGKILL)

        def restarted(name: str = name, pid: int = pid) -> bool:
            return home.status()["ready"] and home.pids()[name] != pid

        until(restarted, f"{name} to be back")
        said = (home.data / "log" / "up.log").read_text()
        assert f"{name} ended with exit code -9; restarting it in 0.5 s" in said
        assert f"{name} is ready again" in said


def test_all_ports_in_use_are_named_at_once_with_their_options(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ports = []
        for _ in OPTIONS:
            taken = stack.enter_context(socket.socket())
            taken.bind((HOST, free_port()))
            taken.listen()
            ports.append(str(taken.getsockname()[1]))
        asked = [argument for pair in zip(OPTIONS, ports, strict=True) for argument in pair]
        done = Home(tmp_path / "data").run("up", "--detach", *asked)
    assert done.returncode == 2
    for option, port in zip(OPTIONS, ports, strict=True):
        assert f"port {port} is in use: choose another with {option} PORT" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_stored_messages_survive_ctrl_c_and_a_killed_supervisor(tmp_path: Path) -> None:
    home, output = Home(tmp_path / "data"), tmp_path / "output"
    with ExitStack() as stack:
        stack.callback(home.run, "down")
        with output.open("wb") as log:
            running = subprocess.Popen(
                [*MILLPOND, "up", "--data", str(home.data), *FREE_PORTS], stdout=log, stderr=log
            )
        stack.callback(running.kill)
        until(lambda: "millpond is ready" in output.read_text(), "millpond to be ready")
        home.says("pub", "-q", "1", "-t", TOPIC, "-m", "21.5")
        until(lambda: home.stored() == ["21.5"], "the message to be stored")
        pids, addresses = home.pids(), home.status()["addresses"]

        running.send_signal(signal.SIGINT)
        assert running.wait(WAIT_S) == 0
        assert not any(psutil.pid_exists(pid) for pid in pids.values())

        # Without options and with 0, the ports are those of the last run.
        home.says("up", "--detach")
        assert home.status()["addresses"] == addresses
        assert home.stored() == ["21.5"]
        state = DataDirectory(home.data).read_state()
        assert state is not None
        orphans = home.pids()
        os.kill(state.supervisor.pid, signal.SIGKILL)
        until(lambda: state.supervisor.running() is None, "the supervisor to be gone")

        home.says("up", "--detach", *FREE_PORTS)
        assert home.status()["addresses"] == addresses
        assert not set(orphans.values()) & set(home.pids().values())
        assert home.stored() == ["21.5"]
        pids = home.pids()
        assert home.says("down") == "stopped\n"
        assert not any(psutil.pid_exists(pid) for pid in pids.values())
        assert not home.status()["running"]


def test_a_kafka_and_a_redis_of_the_user_replace_ours(
    own_kafka: Server, own_redis: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLPOND_NO_SUCH_SETTING", "1")
    home = Home(tmp_path / "data")
    # The file of the user is in the data directory, and stays as it is.
    home.data.mkdir()
    config = home.data / "millpond.toml"
    written = (
        f'redis = "{own_redis.address}"\n[kafka]\nbootstrap_servers = ["{own_kafka.address}"]\n'
    )
    config.write_text(written)
    with ExitStack() as stack:
        stack.callback(home.run, "down")
        said = home.says("up", "--detach", *FREE_PORTS, "--config", str(config))
        assert said.count("warning: ") == 1
        assert config.read_text() == written
        assert list(home.pids()) == ["bridge embedded", *WORKERS, "web"]
        addresses = home.status()["addresses"]
        assert addresses["Kafka"] == own_kafka.address
        assert addresses["Redis"] == own_redis.address.removeprefix("redis://")
        home.says("pub", "-q", "1", "-t", TOPIC, "-m", "on")
        until(lambda: home.stored() == ["on"], "the message to be stored")
    assert own_kafka.answers()
    assert own_redis.answers()


def test_a_redis_or_kafka_that_does_not_answer_is_named_before_anything_starts(
    tmp_path: Path,
) -> None:
    port = free_port()
    conf = tmp_path / "emqx_backend_redis.conf"
    conf.write_text(
        f"# the old file\nbackend.redis.pool1.server = {HOST}:{port}\n"
        'backend.redis.hook.message.publish.1 = {"topic": "#", "action": '
        '{"function": "on_message_publish"}, "pool": "pool1"}\n'
    )
    home = Home(tmp_path / "data")
    done = home.run("up", "--detach", *FREE_PORTS, "--config", str(conf))
    assert done.returncode == 1
    assert done.stderr.startswith(f"millpond: Redis at {HOST}:{port} (from {conf}:2): ")
    assert "--redis embedded" in done.stderr
    assert len(done.stderr.splitlines()) == 1

    config = tmp_path / "millpond.toml"
    config.write_text(f'[kafka]\n\nbootstrap_servers = ["{HOST}:{port}"]\n')
    done = home.run("up", *FREE_PORTS, "--config", str(config))
    assert done.returncode == 1
    assert f"Kafka cannot be reached: {HOST}:{port}: " in done.stderr
    assert f"(from {config}:3)" in done.stderr
    assert len(done.stderr.splitlines()) == 1

    done = home.run("up", *FREE_PORTS, "--kafka", "oats")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert not list(home.data.glob("log/kafka.log"))


def test_a_wrong_configuration_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "millpond.toml"
    config.write_text("[kafka]\nparts = 24\n")
    done = Home(tmp_path / "data").run("up", *FREE_PORTS, "--config", str(config))
    assert done.returncode == 2
    assert done.stderr.startswith(f"millpond: {config}:2: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data" / "kafka").exists()


def test_a_file_that_millpond_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "kafka").mkdir()
    (tmp_path / "kafka" / "server.properties").write_text("broker.id=7\n")
    done = Home(tmp_path).run("up", "--detach", *FREE_PORTS)
    assert done.returncode == 2
    assert f"{tmp_path / 'kafka'} was not written by `millpond up`" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["kafka"]


def test_status_and_down_report_that_nothing_runs(tmp_path: Path) -> None:
    home = Home(tmp_path / "data")
    assert home.run("status").returncode == 1
    assert "nothing runs" in home.says("down")


def test_a_pid_that_another_process_has_now_is_left_alone(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path / "data")
    directory.create()
    reused = Process(os.getpid(), identify(os.getpid()).created_at - 1)
    child = ChildState("kafka", reused, ready=True, restarts=0)
    directory.write_state(StackState(reused, {}, [child], ready=True))
    assert not Home(directory.root).status()["running"]
    assert down(directory)
    assert directory.read_state() is None
