"""The files that users write: UTF-8 in any locale, with what Windows puts around it, and one line about all else."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from pathlib import Path

import pytest

from millpond.pipeline.settings import load, read_secret
from millpond.schemas.errors import ConfigError

TOML = 'app = "farm"\n[pool.p]\nserver = "h:1"\n\n[[rule]]\nhook = "message.acked"\ncommands = ["SET ü 1"]\n'
CONF = (
    "backend.redis.p.server = h:1\n\n"
    'backend.redis.hook.message.acked.1 = {"action": {"commands": ["SET ü 1"]}}\n'
)
FILES = [("millpond.toml", TOML), ("emqx_backend_redis.conf", CONF)]


@pytest.mark.parametrize(("name", "text"), FILES)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_crlf_change_nothing(
    tmp_path: Path, name: str, text: str, mark: bytes, end: str
) -> None:
    path = tmp_path / name
    path.write_bytes(mark + text.replace("\n", end).encode())
    _, rules = load(path, {})
    (rule,) = rules.rules
    assert rule.commands == (("SET", "ü", "1"),)
    assert rule.line == text.count("\n", 0, text.index("message.acked")) + (name[0] == "e")


@pytest.mark.parametrize(("name", "text"), FILES)
@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("utf-16", "looks like UTF-16"),
        ("utf-16-le", "looks like UTF-16"),
        ("latin-1", "is not UTF-8: byte 0xfc in line"),
    ],
)
def test_another_encoding_is_one_line_that_says_so(
    tmp_path: Path, name: str, text: str, encoding: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert caught.value.reason.startswith(reason)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "millpond.toml"
    path.write_bytes(TOML.encode())
    code = (
        "from pathlib import Path; from millpond.pipeline.settings import load;"
        "print(ascii(load(Path('millpond.toml'), {})[1].rules[0].commands))"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **ascii_only},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "(('SET', '\\xfc', '1'),)\n"


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"word", "word"),
        (b"word\nmore\n", "word"),
        (b"word\r\n", "word"),
        (codecs.BOM_UTF8 + b"word\n", "word"),
        ("a\x0bb\u2028c\n".encode(), "a\x0bb\u2028c"),
        (b" spaces \n", " spaces "),
    ],
)
def test_a_secret_is_the_first_line_of_its_file(
    tmp_path: Path, content: bytes, secret: str
) -> None:
    (tmp_path / "word").write_bytes(content)
    assert read_secret(str(tmp_path / "word"), "[kafka] password_file") == secret


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read"),
        (b"", "first line is empty"),
        (b"\nword", "first line is empty"),
        (b"\xff\xfew\0", "looks like UTF-16"),
        (b"w\xfcrd", "is not UTF-8"),
    ],
)
def test_a_secret_that_cannot_be_read_is_an_error_that_names_its_setting(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "word").write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_secret(str(tmp_path / "word"), "[kafka] password_file")
    assert str(caught.value).startswith("[kafka] password_file: ")
