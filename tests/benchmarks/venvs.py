"""The peers' virtual environments: one each below `.bench/`, with exactly the versions of their requirements."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Final

from tests.benchmarks.table import progress

PEERS: Final = Path(__file__).parent / "peers"
ROOT: Final = Path(__file__).parents[2] / ".bench"


def python(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made anew whenever its requirements change."""
    requirements = PEERS / f"{peer}.txt"
    directory = ROOT / peer
    interpreter = directory / "bin" / "python"
    digest = sha256(requirements.read_bytes()).hexdigest()
    installed = directory / ".installed"
    if not installed.exists() or installed.read_text() != digest:
        progress(f"installing {peer} into .bench/{peer}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", requirements], check=True)
        installed.write_text(digest)
    return interpreter


def version(peer: str, package: str) -> str:
    """The version of a package that a peer's requirements pin."""
    lines = (PEERS / f"{peer}.txt").read_text().split()
    pins = dict(line.split("==") for line in lines)
    return pins[package]
