"""The Makefile's targets install what they need, and no more."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("target", "extras"),
    [("up", ["local,emqx,otel"]), ("lint", ["local,emqx,otel,docs,dev"])],
)
def test_users_do_not_install_the_tools_of_developers(
    target: str, extras: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}/venv"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert [line.partition("'.[")[2].rstrip("]'") for line in installs] == extras
