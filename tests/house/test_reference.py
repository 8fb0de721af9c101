"""Reference of keys: each has a meaning beside its field, and docs/reference.md is made of these."""

import re

import msgspec
import pytest

from minitune.io.field_comments import comments_of
from minitune.io.json_schema import tables_of
from minitune.models.config import DecoderConfig
from minitune.models.open import FAMILIES
from minitune.programs.program import Program
from support import reference_page

pytestmark = pytest.mark.fast

PAGE = reference_page.PAGE.read_text("utf-8")
TAGS = ("op", "kind", "rope_type")

KINDS = [info.cls for info in (*tables_of(Program), *tables_of(DecoderConfig))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_has_a_meaning(kind: type[msgspec.Struct]) -> None:
    silent = [name for name, comment in comments_of(kind).items() if not comment]
    place = f"{kind.__module__}.{kind.__name__}"
    assert not silent, f"{place}: say in a comment beside the field what {silent} mean"


def test_the_page_is_what_the_structs_say() -> None:
    help_ = f"docs/reference.md is not what the structs say; run {reference_page.COMMAND}"
    assert reference_page.page() == PAGE, help_


def test_the_page_has_a_row_for_every_key_of_the_schema() -> None:
    schemas = [msgspec.json.schema(kind)["$defs"] for kind in (Program, DecoderConfig)]
    tables = [table for schema in schemas for table in schema.values()]
    keys = [key for table in tables for key in table["properties"] if key not in TAGS]
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == sorted(keys)
    for tag in TAGS:
        tags = [table["properties"][tag]["enum"] for table in tables if tag in table["properties"]]
        headings = re.findall(rf'^### `{tag} = "(.*)"`$', PAGE, re.M)
        assert sorted(headings) == sorted(value for (value,) in tags)


def test_a_family_is_shown_with_the_defaults_that_it_has() -> None:
    rows = dict(re.findall(r"^\| `family = \"(\w+)\"` \| (.*) \|$", PAGE, re.M))
    assert list(rows) == list(FAMILIES)
    usual = {field.name: field.default for field in msgspec.structs.fields(DecoderConfig)}
    for name, row in rows.items():
        own = {field.name: field.default for field in msgspec.structs.fields(FAMILIES[name].config)}
        differing = [key for key, default in own.items() if default != usual[key]]
        assert re.findall(r"`(\w+)(?: = [^`]*)?`", row) == differing
        shown = msgspec.toml.decode("\n".join(re.findall(r"`(\w+ = [^`]*)`", row)))
        assert msgspec.json.encode(shown) == msgspec.json.encode({key: own[key] for key in shown})


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
