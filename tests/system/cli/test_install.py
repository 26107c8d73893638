"""The wheel, installed beside packages that have the names of our folders, and used from a directory that has them too."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("agents", "schemas", "pipeline")
FOREIGN = "raise ImportError('this package is not of Millpond')\n"
PORTS = {
    f"MILLPOND_STACK_{name}_PORT": "0" for name in ("MQTT", "WEBSOCKET", "KAFKA", "REDIS", "WEB")
}


def foreign_packages(directory: Path) -> None:
    for name in FOLDERS:
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(FOREIGN)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_of(ROOT, tmp_path_factory.mktemp("wheel"))


def built_of(source: Path, directory: Path) -> Path:
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", str(directory), str(source),
        ],
        check=True,
    )  # fmt: skip
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`millpond` in an environment that holds other packages named as our folders are."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
    foreign_packages(packages)
    # The dependencies are those of the environment that runs the tests.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [directory / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    return directory / "bin" / "millpond"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A working directory that holds packages named as our folders, and as a dependency."""
    foreign_packages(tmp_path)
    (tmp_path / "redis.py").write_text(FOREIGN)
    yield tmp_path


def test_the_wheel_has_one_package_and_each_file_once(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "millpond",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }
    source = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    own = ["millpond/__init__.py", "millpond/__main__.py", "millpond/py.typed"]
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(
        [*own, *(f"millpond/{name}" for name in source)]
    )


def test_a_wheel_made_of_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (source,) = tmp_path.glob("*.tar.gz")
    with ZipFile(wheel) as one, ZipFile(built_of(source, tmp_path)) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_a_stack_runs_where_other_packages_have_our_folders_names(
    program: Path, elsewhere: Path
) -> None:
    def millpond(*arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments], cwd=elsewhere, env={**os.environ, **PORTS},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        assert "millpond is ready" in millpond("up", "--detach")
        millpond("pub", "-q", "1", "-t", "a", "-m", "b")
        assert '"ready": true' in millpond("status", "--json")
    finally:
        assert millpond("down") == "stopped\n"


def test_the_package_runs_as_a_module(program: Path, tmp_path: Path) -> None:
    command = [str(program.with_name("python")), "-m", "millpond", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("millpond ")
