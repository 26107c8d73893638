"""A command whose optional dependencies are missing says which extra brings them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[4] / "pyproject.toml"
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from millpond.pipeline.cli.main import main
sys.argv[1:] = {arguments!r}
main()
"""


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", each, maxsplit=1)[0].lower() for each in requirements}


def modules(extra: str) -> set[str]:
    """The top-level modules that only this extra brings."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    only = distributions(project["optional-dependencies"][extra]) - distributions(
        project["dependencies"]
    )
    return {
        module
        for module, owners in packages_distributions().items()
        if only & {owner.lower().replace("_", "-") for owner in owners}
    } - {"google"}  # a namespace that others share


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("local", ["up"]),
        ("local", ["down"]),
        ("local", ["status"]),
        ("local", ["pub", "-t", "a"]),
        ("local", ["sub", "-t", "a"]),
        ("local", ["bridge", "embedded"]),
        ("emqx", ["bridge", "emqx"]),
    ],
)
def test_a_missing_extra_is_named(extra: str, arguments: list[str], tmp_path: Path) -> None:
    missing = modules(extra)
    assert len(missing) > 3
    code = WITHOUT.format(missing=missing, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    command = " ".join(arguments[:2] if arguments[0] == "bridge" else arguments[:1])
    assert done.stderr.splitlines()[-1] == (
        f"millpond: `millpond {command}` needs pip install 'millpond[{extra}]'"
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
