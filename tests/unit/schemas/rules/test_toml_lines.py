"""Line numbers of TOML keys, in all forms of TOML."""

from __future__ import annotations

import pytest

from millpond.schemas.rules.toml_lines import TomlLines

DOCUMENT = '''\
app = "x"
title = """
[[rule]]
topic = 1
"""
pool.p0.server = "s"   # dotted

[pool.p1]
# comment
server = "s"
tls = { on = true,   ca = "c" }
many = [
  1, # [[rule]]
  2,
]
after = 1

[[rule]]
hook = "h"
[rule.sub]
deep = 1
[["rule"]]

  hook = "h"
    [[ rule.steps ]]
    name = 1
    [[ rule.steps ]]
    name = 2
[kafka]
x = 1'''


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("app",), 1),
        (("title",), 2),
        (("pool", "p0"), 6),
        (("pool", "p0", "server"), 6),
        (("pool", "p1"), 8),
        (("pool", "p1", "server"), 10),
        (("pool", "p1", "tls"), 11),
        (("pool", "p1", "tls", "ca"), 11),
        (("pool", "p1", "many"), 12),
        (("pool", "p1", "many", 1), 12),
        (("pool", "p1", "after"), 16),
        (("rule", 0), 18),
        (("rule", 0, "hook"), 19),
        (("rule", 0, "missing"), 18),
        (("rule", 0, "sub"), 20),
        (("rule", 0, "sub", "deep"), 21),
        (("rule", 1), 22),
        (("rule", 1, "hook"), 24),
        (("rule", 1, "steps", 0, "name"), 26),
        (("rule", 1, "steps", 1, "name"), 28),
        (("kafka", "x"), 30),
        (("nowhere", "at", "all"), 1),
    ],
)
def test_a_key_has_the_line_where_it_begins(
    path: tuple[str | int, ...], line: int, newline: str
) -> None:
    assert TomlLines(DOCUMENT.replace("\n", newline)).of(*path) == line


def test_an_inline_array_of_tables_has_the_line_of_its_key() -> None:
    assert TomlLines('\nrule = [\n{hook = "h"},\n{hook = "i"}]').of("rule", 1, "hook") == 2
