"""JSON Schema with descriptions: an editor shows what stands beside a field."""

import msgspec
import pytest

from minitune.io.json_schema import described, tables_of

pytestmark = pytest.mark.fast


class Inner(msgspec.Struct):
    """Table inside."""

    a: int = 0  # meaning of a


class Outer(msgspec.Struct):
    """Table around it."""

    inner: Inner | None = None  # meaning of inner
    by_name: dict[str, Inner] = {}
    deep: list[Inner] = []  # meaning of deep


def test_tables_and_keys_are_described() -> None:
    schema = described(Outer)
    outer, inner = schema["$defs"]["Outer"], schema["$defs"]["Inner"]
    assert (outer["description"], inner["description"]) == ("Table around it.", "Table inside.")
    assert inner["properties"]["a"]["description"] == "meaning of a"
    texts = {name: entry.get("description") for name, entry in outer["properties"].items()}
    assert texts == {"inner": "meaning of inner", "by_name": None, "deep": "meaning of deep"}


def test_nothing_else_of_the_schema_changes() -> None:
    schema = described(Outer)
    for table in schema["$defs"].values():
        for entry in table["properties"].values():
            entry.pop("description", None)
    assert schema == msgspec.json.schema(Outer)


def test_tables_are_found_once_each_level_by_level() -> None:
    assert [info.cls for info in tables_of(Outer)] == [Outer, Inner]
