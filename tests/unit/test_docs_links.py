"""Every link of every Markdown document leads to a file, and to a heading of it, on GitHub as on the site."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README_LINES_MAX = 250
# The site has anchors for these levels: `myst_heading_anchors` of docs/conf.py.
HEADING = re.compile(r"^(#{1,3}) +(.*?) *$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors of its headings, as GitHub makes them."""
    found: list[str] = []
    times: Counter[str] = Counter()
    for _, heading in HEADING.findall(prose(document)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return frozenset(found)


def links() -> list[tuple[Path, str]]:
    """Each document with each of its links; none twice."""
    return [
        (document, target)
        for document in DOCUMENTS
        for target in dict.fromkeys(LINK.findall(re.sub(r"`[^`\n]*`", "", prose(document))))
    ]


def shown(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("document", "target"), links(), ids=shown)
def test_every_link_leads_somewhere(document: Path, target: str) -> None:
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    leads_to = (document.parent / path).resolve() if path else document
    assert leads_to.exists()
    assert leads_to.is_relative_to(ROOT)
    if anchor:
        assert anchor in anchors(leads_to)


def test_the_readme_is_a_shop_window() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX
