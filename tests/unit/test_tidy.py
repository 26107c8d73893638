"""Style is a test: what the linters do not measure."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("millpond", "schemas", "agents", "pipeline", "examples", "tests")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SHIPPED = [path for path in SOURCES if ROOT / "tests" not in path.parents]

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_MEDIAN_MAX = 10
SUPERVISOR_LINES_MAX = 200
# Whole words that would tie the code to one machine or one package registry.
FOREIGN = re.compile(
    r"/(?:root|home|work)/|pypi\.org|pythonhosted|repo1?\.maven|artifactory", re.IGNORECASE
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_no_shipped_file_is_longer_than_a_reader_has_patience_for(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert [
        f"{name}: {lines}" for name, lines in functions(path) if lines > FUNCTION_LINES_MAX
    ] == []


def test_most_functions_are_short() -> None:
    lengths = [lines for path in SHIPPED for _, lines in functions(path)]
    assert median(lengths) < FUNCTION_LINES_MEDIAN_MAX


def test_the_supervisor_stays_small() -> None:
    supervisor = ROOT / "pipeline" / "stack" / "supervisor.py"
    assert len(supervisor.read_text().splitlines()) < SUPERVISOR_LINES_MAX


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_every_file_says_what_lives_there(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_no_text_depends_on_the_locale(path: Path) -> None:
    """A text file is read and written with the name of its encoding."""
    unnamed = [
        f"line {node.lineno}: {node.func.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            (node.func.attr == "read_text" and not node.args)
            or (node.func.attr == "write_text" and len(node.args) < 2)
        )
        and not any(each.arg == "encoding" for each in node.keywords)
    ]
    assert unnamed == []


# Bases that say nothing of a class's methods.
PLAIN = {"ABC", "Exception", "Generic", "IntEnum", "NamedTuple", "Protocol", "Struct"}


class Class(NamedTuple):
    name: str
    bases: list[str]
    methods: dict[str, bool]  # the public ones, and whether each has a docstring


def classes(path: Path) -> Iterator[Class]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            yield Class(
                node.name,
                [ast.unparse(base).partition("[")[0] for base in node.bases],
                {
                    each.name: ast.get_docstring(each) is not None
                    for each in node.body
                    if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                    and not each.name.startswith("_")
                },
            )


def test_every_public_method_has_a_docstring_where_it_is_declared() -> None:
    """A method without one overrides one that has one: of a protocol or base of ours, or of another library's class."""
    ours = [found for path in SHIPPED for found in classes(path)]
    bases = {each.name: each.bases for each in ours if each.name not in each.bases}
    documented = {name for each in ours for name, said in each.methods.items() if said}

    def of_a_library(base: str) -> bool:
        return base not in PLAIN and (
            base not in bases or any(of_a_library(above) for above in bases[base])
        )

    missing = [
        f"{each.name}.{name}"
        for each in ours
        for name, said in each.methods.items()
        if not said and name not in documented and not any(map(of_a_library, each.bases))
    ]
    assert missing == []


# Words of a private language, which a reader has to learn first.
PRIVATE_WORDS = re.compile(r"\b(told|nobody|somebody|whoever|anew|goes on)\b", re.IGNORECASE)
# These are written again by issues of their own.
TO_BE_REWRITTEN = ("agents/delivery", "agents/queue", "agents/pubsub", "pipeline/brokers/embedded")


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if not named(path).startswith(TO_BE_REWRITTEN)], ids=named
)
def test_sentences_use_plain_words(path: Path) -> None:
    assert PRIVATE_WORDS.findall(path.read_text()) == []


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in SHIPPED:
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.ClassDef(name=name):
                    places.setdefault(name, []).append(named(path))
                case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id="TypeAlias")):
                    places.setdefault(name, []).append(named(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_nothing_names_a_machine_or_a_registry(path: Path) -> None:
    if path != Path(__file__):
        assert FOREIGN.findall(path.read_text()) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run"])
def test_nothing_in_the_build_names_a_machine_or_a_registry(name: str) -> None:
    assert FOREIGN.findall((ROOT / name).read_text()) == []


def test_every_ignored_lint_rule_has_its_reason_beside_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    begin = lines.index("[tool.ruff.lint]")
    ignored = [line for line in lines[begin:] if re.match(r'\s*"[A-Z]+[0-9]*",', line)]
    assert ignored
    unreasoned = [line for line in ignored if "#" not in line]
    assert unreasoned == []


def test_every_constraint_is_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert [
        line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.]*", line)
    ] == []


def test_what_is_pinned_for_its_inner_workings_is_pinned_to_its_minor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {"faust-streaming~=0.15.3", "mode-streaming~=0.7.1", "aiokafka~=0.14.0"}
    assert pinned <= set(project["dependencies"])
