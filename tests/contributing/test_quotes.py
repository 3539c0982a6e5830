# SPDX-License-Identifier: Apache-2.0
"""The Python of docs/contributing is that of tests, word for word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted((ROOT / "docs" / "contributing").glob("*.md"))
BLOCK = re.compile(r"^(?:<!-- (?P<source>\S+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def quotes(page: Path) -> list[tuple[str | None, str]]:
    """(file named in the comment above, code) of each Python block."""
    return [(block["source"], block["code"]) for block in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_quoted_from_a_test(page):
    found = quotes(page)
    assert found, f"{page.name} shows no code"
    for source, code in found:
        assert source, f"{page.name}: no <!-- FILE --> above {code.splitlines()[0]!r}"
        lines = f"\n{(ROOT / source).read_text(encoding='utf-8')}"
        assert f"\n{code}" in lines, f"{page.name}: {source} does not say {code.splitlines()[0]!r} and so on"


def test_every_example_is_shown():
    shown = {source for page in PAGES for source, _ in quotes(page)}
    examples = {file.relative_to(ROOT).as_posix() for file in Path(__file__).parent.glob("test_*.py")}
    assert examples - shown == {"tests/contributing/test_quotes.py"}


def test_a_quote_that_differs_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- tests/contributing/test_quotes.py -->\n```python\nROOT = 1\n```\n")
    with pytest.raises(AssertionError, match="does not say 'ROOT = 1'"):
        test_code_is_quoted_from_a_test(page)
