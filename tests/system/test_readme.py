"""The examples of the README and of every document, typed as printed into a shell, against a stack as `make up` starts it.

All documents share one stack, and each uses names of its own. The quickstart is last: it changes the rules, and ends by
deleting everything.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs/tutorial/quickstart.md"
WAIT_S = 60.0  # for what an example shows to come true; generous, since machines are shared
MARK = "== done"
REDIS = "127.0.0.1:6379"
# Examples show the default ports; two test runs beside each other need others.
FREE_PORTS = {
    f"MILLPOND_STACK_{name}_PORT": "0" for name in ("MQTT", "WEBSOCKET", "KAFKA", "REDIS", "WEB")
}


class Example(NamedTuple):
    """One command, with the lines of what it reads, and what it prints; `…` there is anything."""

    command: str
    output: str

    def shown_by(self, said: str) -> bool:
        """Whether this is what the document shows; spaces at the ends of lines do not show."""
        said = "\n".join(line.rstrip() for line in said.splitlines())
        pattern = re.escape(self.output.rstrip("\n")).replace("…", ".*")
        return re.fullmatch(pattern, said.rstrip("\n"), re.DOTALL) is not None

    @property
    def only_reads(self) -> bool:
        """Whether it may be typed again until it shows what was just published."""
        reads = (
            "redis", "clients", "dead-letters list", "dead-letters show", "explain", "topics", "lag",
        )  # fmt: skip
        return self.command.startswith(("cat ", *(f"millpond {name}" for name in reads)))


def examples(document: Path) -> Iterator[Example]:
    """Every example of a document, in order."""
    for block in re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL):
        for shown in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            heredoc = re.match(r"[^\n]*<<'(\w+)'\n.*?^\1\n", shown, re.DOTALL | re.MULTILINE)
            command = heredoc[0] if heredoc else shown.partition("\n")[0]
            yield Example(command, shown[len(command) :].lstrip("\n"))


def documents() -> list[Path]:
    """Those with examples, the quickstart last."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found.sort(key=lambda document: document == QUICKSTART)
    return [document for document in found if next(examples(document), None) is not None]


class Shell:
    """A shell that somebody types into, with `millpond` on its path."""

    def __init__(self, directory: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            ["bash"], cwd=directory, env={**os.environ, **FREE_PORTS, "PATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def type(self, command: str) -> str:
        """What a command prints; it must succeed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        here = command
        if REDIS in command:
            status = json.loads(self.type("millpond status --json"))
            here = command.replace(REDIS, status["addresses"]["Redis"])
        stdin.write(f"{{ {here}\n}} </dev/null; echo $'\\n{MARK}' $?\n")
        stdin.flush()
        # The mark is on a line of its own, whether the command ended its last one or not.
        said: list[str] = []
        for line in stdout:
            if line.startswith(MARK):
                assert line == f"{MARK} 0\n", command + "\n" + "".join(said)
                return "".join(said)
            said.append(line)
        raise AssertionError(f"the shell ended at: {command}\n{''.join(said)}")

    def close(self) -> None:
        self._process.communicate(timeout=WAIT_S)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a directory of its own."""
    shell = Shell(tmp_path_factory.mktemp("examples"))
    try:
        yield shell
    finally:
        shell.type("millpond down")
        shell.close()


@pytest.mark.timeout(900)  # an hour of a newcomer; machines are shared
@pytest.mark.parametrize(
    "document", documents(), ids=lambda document: str(document.relative_to(ROOT))
)
def test_every_example_works_as_printed(shell: Shell, document: Path) -> None:
    shell.type("millpond status || millpond up --detach")
    for example in examples(document):
        deadline = time.monotonic() + WAIT_S
        while not example.shown_by(said := shell.type(example.command)):
            assert example.only_reads, (example, said)
            assert time.monotonic() < deadline, (example, said)


def test_the_readme_and_the_quickstart_have_their_examples() -> None:
    assert len(list(examples(ROOT / "README.md"))) >= 5
    assert len(list(examples(QUICKSTART))) > 20
