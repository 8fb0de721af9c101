"""Messages that docs/troubleshooting.md quotes are those of the source."""

import ast
import re

import pytest

from support.paths import PACKAGE, ROOT

pytestmark = pytest.mark.fast

PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
ENTRIES = re.findall(r"^- (?:\*\*|`)(.*(?:\n  .*)*)", PAGE, re.MULTILINE)
QUOTED = re.findall(r"^- `([^`]+)`:", PAGE, re.MULTILINE)
INSIDE = ["the learning rate ends at", "are longer than max_new_tokens", "rounding loses at most"]


def said() -> list[str]:
    """Strings of the source that a message may be made of, what is put into them left out."""
    strings = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                strings.append("".join(map(str, parts)))
    return strings


SAID = said()


def is_said(words: str) -> bool:
    return any(words in string for string in SAID)


def test_the_page_has_thirty_entries() -> None:
    assert 30 <= len(ENTRIES) <= 45


@pytest.mark.parametrize("message", [*QUOTED, *INSIDE])
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert f"{message}`" in PAGE
    for part in message.split("..."):
        words = part.strip(" ,")
        # a message may be put together of two strings, between two words
        parts = [(words[:n].strip(), words[n:].strip()) for n in [0, *(m.start() for m in re.finditer(" ", words))]]
        assert any(is_said(left) and is_said(right) for left, right in parts), words


def test_a_message_that_nothing_says_is_found() -> None:
    assert not is_said("is a flag and not the file itself")
