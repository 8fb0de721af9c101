"""Keys of a struct in the words of one who writes TOML."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from minitune.io.key_types import Key, in_words, keys_of

pytestmark = pytest.mark.fast


class Leaf(msgspec.Struct, frozen=True, tag="leaf", tag_field="kind"):
    """Table of a kind."""

    depth: int = 2
    size: float = 0.5  # meaning


class Other(msgspec.Struct, tag="other", tag_field="kind"):
    """Table of another kind."""


class Table(msgspec.Struct):
    """Table that holds all that a default may be."""

    needed: str
    may_be_absent: int | None = None
    chosen: Leaf | Other = Leaf(depth=3)
    by_name: dict[str, Leaf] = {}
    listed: tuple[Leaf, ...] = msgspec.field(default_factory=tuple)
    flag: bool = True


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (str, "string"),
        (bool, "true or false"),
        (int, "integer"),
        (float, "number"),
        (Any, "any value"),
        (Annotated[int, Meta(gt=0, le=2**31 - 1)], "integer >= 1"),
        (Annotated[int, Meta(ge=1, lt=100)], "integer >= 1 and <= 99"),
        (Annotated[float, Meta(ge=0.0, le=1e30)], "number >= 0"),
        (Annotated[float, Meta(gt=0.0, lt=1.0)], "number > 0 and < 1"),
        (int | None, "integer"),
        (Annotated[int, Meta(gt=0)] | Annotated[float, Meta(lt=0.5)], "integer >= 1 or number < 0.5"),
        (Literal["b", "a"], 'one of "a", "b"'),
        (Literal[32, 64], "one of 32, 64"),
        (str | tuple[str, ...], "string or list of strings"),
        (list[Annotated[int, Meta(ge=3)]], "list of integers >= 3"),
        (tuple[float, float], "list of 2: number"),
        (dict[str, Any], "table"),
        (dict[str, str], "table of strings"),
        (dict[str, list[int]], "table of lists of integers"),
        (Leaf, "table"),
        (Leaf | Other, "table"),
        (tuple[Leaf | Other, ...], "list of tables"),
    ],
)
def test_a_type_has_a_users_words(kind: Any, words: str) -> None:
    info = msgspec.inspect.type_info(kind)
    assert in_words(info) == words


def table_info(kind: type) -> msgspec.inspect.StructType:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return info


def test_defaults_are_toml_and_tables_say_only_what_differs() -> None:
    defaults = {key.name: key.default for key in keys_of(table_info(Table))}
    assert defaults == {
        "needed": None,
        "may_be_absent": "",
        "chosen": '{ kind = "leaf", depth = 3 }',
        "by_name": "{}",
        "listed": "[]",
        "flag": "true",
    }


def test_a_key_names_the_tables_that_it_may_hold() -> None:
    held = {key.name: [info.cls for info in key.structs] for key in keys_of(table_info(Table))}
    assert held["chosen"] == [Leaf, Other]
    assert held["by_name"] == held["listed"] == [Leaf]
    assert held["needed"] == held["flag"] == []
    assert keys_of(table_info(Leaf))[1] == Key("size", "number", "0.5", "meaning", ())
