"""Reference of keys: each has a meaning beside its field, and docs/reference.md is made of these."""

import re

import msgspec
import pytest

from minitune.io.field_comments import comments_of
from minitune.io.json_schema import tables_of
from minitune.programs.program import Program
from support import reference_page

pytestmark = pytest.mark.fast

PAGE = reference_page.PAGE.read_text("utf-8")


KINDS = [info.cls for info in tables_of(Program)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_has_a_meaning(kind: type[msgspec.Struct]) -> None:
    silent = [name for name, comment in comments_of(kind).items() if not comment]
    place = f"{kind.__module__}.{kind.__name__}"
    assert not silent, f"{place}: say in a comment beside the field what {silent} mean"


def test_the_page_is_what_the_structs_say() -> None:
    help_ = f"docs/reference.md is not what the structs say; run {reference_page.COMMAND}"
    assert reference_page.page() == PAGE, help_


def test_the_page_has_a_row_for_every_key_of_the_schema() -> None:
    tables = msgspec.json.schema(Program)["$defs"].values()
    keys = [key for table in tables for key in table["properties"] if key not in ("op", "kind")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == sorted(keys)
    for tag in ("op", "kind"):
        tags = [table["properties"][tag]["enum"] for table in tables if tag in table["properties"]]
        headings = re.findall(rf'^### `{tag} = "(.*)"`$', PAGE, re.M)
        assert sorted(headings) == sorted(value for (value,) in tags)


def test_every_link_of_the_page_has_its_heading() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.M)
    plain = ["".join(c for c in text.lower() if c.isalnum() or c in " -_") for text in headings]
    anchors = {text.replace(" ", "-") for text in plain}
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) == anchors


def test_a_cell_shows_a_meaning_as_it_is_written() -> None:
    text = 'a | b, `c | d`, *e* and "*_proj", seq_len <f> -> g < 1'
    written = reference_page.shown_as_is(text)
    assert written == r'a \| b, `c \| d`, \*e\* and "\*\_proj", seq_len \<f> -> g < 1'
