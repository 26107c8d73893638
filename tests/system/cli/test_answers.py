"""Every command ends soon with an honest line while Kafka or Redis hangs: the connection is open, and nothing is answered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.servers import pause

MILLPOND = (sys.executable, "-m", "millpond")
OPTIONS = ("--mqtt-port", "--websocket-port", "--kafka-port", "--redis-port", "--web-port")
WAIT_S = 180.0  # for a command that is not under test
# Two requests without an answer, and a start of Python on a very busy machine. Users wait for less; before there were
# time-outs, these commands took 50 s or never ended.
BOUND_S = 40.0
QUEUE, NEWS = "queue/orders", "pubsub/news"

LOOKS_AT_REDIS = (
    "clients list", "clients show alice", "topics", f"topics {QUEUE}", f"explain --topic {QUEUE}",
    "dead-letters list", "dead-letters show ID", "dead-letters drop ID", "redis GET x",
)  # fmt: skip
NEEDS_BOTH = (
    "status", "status --json", "lag", "lag --watch --json", "config check", "explain ID",
    "dead-letters requeue --all --yes", f"rewind --subscriber alice -t {NEWS} --to earliest",
    "replay messages --into INTO", "rebuild messages --yes",
)  # fmt: skip
LOOKS_AT_KAFKA = ("kafka check", "kafka init")


class Stack:
    """A stack of `millpond up`, with a dead letter and a subscriber."""

    def __init__(self, data: Path) -> None:
        self.data, self.message_id = data, ""
        self.processes: dict[str, psutil.Process] = {}
        self.addresses: dict[str, str] = {}

    def run(self, command: str, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
        into = f"redis://{self.address('redis')}/7" if "INTO" in command else ""
        words = command.replace("ID", self.message_id).replace("INTO", into).split()
        return subprocess.run(
            [*MILLPOND, *words, "--data", str(self.data)],
            capture_output=True, text=True, check=False, timeout=timeout_s,
        )  # fmt: skip

    def says(self, command: str) -> str:
        done = self.run(command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def address(self, server: str) -> str:
        """HOST:PORT of Kafka or Redis."""
        return self.addresses[server.capitalize()]

    def prepare(self) -> None:
        self.says("up --detach " + " ".join(f"{option} 0" for option in OPTIONS))
        self.says(f"sub -E -c -i alice -q 1 -t {NEWS}")
        self.says(f"pub -q 1 -t {NEWS} -m hello")
        self.says(f"pub -q 1 -t {QUEUE} -m broken")
        deadline = time.monotonic() + WAIT_S
        while not self.message_id:
            assert time.monotonic() < deadline
            self.message_id = self.says(f"redis ZRANGE mqtt:msg:{QUEUE} 0 -1").strip()
        for _ in range(5):
            self.says(f"sub -i clerk -q 1 -t {QUEUE} --no-ack -C 1")
        while "1 dead letter" not in self.says("dead-letters list"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self.addresses = json.loads(self.says("status --json"))["addresses"]
        for name in ("kafka", "redis"):
            self.processes[name] = psutil.Process(int(self.says(f"status --pid {name}")))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("answers") / "data")
    try:
        stack.prepare()
        yield stack
    finally:
        stack.run("down")


@contextmanager
def hanging(stack: Stack, server: str) -> Iterator[None]:
    process = stack.processes[server]
    pause(process)
    try:
        yield
    finally:
        process.resume()


@pytest.mark.parametrize(
    ("server", "command"),
    [
        *(("kafka", each) for each in (*NEEDS_BOTH, *LOOKS_AT_KAFKA)),
        *(("redis", each) for each in (*NEEDS_BOTH, *LOOKS_AT_REDIS)),
    ],
)
def test_a_command_ends_soon_and_names_the_server_that_hangs(
    stack: Stack, server: str, command: str
) -> None:
    with hanging(stack, server):
        done = stack.run(command, timeout_s=BOUND_S)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    lines = [each for each in said.splitlines() if each.startswith(("millpond: ", "error: "))]
    (line,) = (each for each in lines if stack.address(server) in each)
    assert " s" in line, "it says how long it waited"
    if line.startswith("millpond: ") and "status" not in command:
        assert said.splitlines()[-1] == line
    if command == "status --json":
        assert json.loads(done.stdout)["ready"] is False
    assert "Traceback" not in said


def test_a_publish_that_kafka_does_not_get_is_not_said_to_be_published(stack: Stack) -> None:
    with hanging(stack, "kafka"):
        done = stack.run(f"pub -q 1 -t {QUEUE} -m unheard", timeout_s=BOUND_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the broker has not answered for 5 s" in done.stderr


def test_everything_is_ready_when_the_servers_answer_again(stack: Stack) -> None:
    deadline = time.monotonic() + WAIT_S
    while stack.run("status").returncode != 0:
        assert time.monotonic() < deadline, stack.run("status").stdout
        time.sleep(0.5)


def test_a_command_that_redis_holds_back_may_have_more_time(stack: Stack) -> None:
    began = time.monotonic()
    done = stack.run("redis --timeout 1 BLPOP nothing 0")
    assert done.returncode == 1
    assert "no reply for 1 s" in done.stderr
    assert stack.says("redis --timeout 0 BLPOP nothing 6").strip() == ""
    assert time.monotonic() - began > 6
