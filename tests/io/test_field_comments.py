"""Comments beside the fields of a struct, and first sentences of docstrings."""

import msgspec
import pytest

from minitune.io.field_comments import comments_of, first_sentence

pytestmark = pytest.mark.fast


class Base(msgspec.Struct):
    """Struct with one field."""

    # of the base
    inherited: int = 0
    # this one is said anew
    changed: int = 0
    silent_below: int = 0  # said by the base alone


class Derived(Base, frozen=True):
    """Struct with comments in every place that counts,
    and a sentence of two lines (Hu et al. 2021, eq. 4). Then another.

    And a paragraph.
    """

    # no comment of a field: a line without one follows

    alone: int = 0
    behind: str = "# no comment"  # at the end
    # first line,
    #   second line
    above: int = 0
    # above
    both: int = 0  # and behind
    lines: tuple[int, ...] = (
        1,  # inside
        # a line inside
        2,
    )  # at the last
    linted: int = 0  # meaning
    changed: int = 1  # by the derived
    silent_below: int = 1

    def method(self) -> int:
        """Number."""
        local: int = 0  # of no field
        return local


def test_a_comment_stands_above_its_field_or_behind_it() -> None:
    assert comments_of(Derived) == {
        "inherited": "of the base",
        "alone": "",
        "behind": "at the end",
        "above": "first line, second line",
        "both": "above and behind",
        "lines": "inside a line inside at the last",
        "linted": "meaning",
        "changed": "by the derived",
        "silent_below": "said by the base alone",
    }


def test_without_source_there_is_no_comment() -> None:
    names: dict = {"msgspec": msgspec}
    exec("class Unwritten(msgspec.Struct):\n    a: int = 0  # meaning\n", names)
    names["Unwritten"].__module__ = "nowhere"
    assert comments_of(names["Unwritten"]) == {"a": ""}


def test_a_sentence_ends_before_a_capital_or_with_its_paragraph() -> None:
    first = "Struct with comments in every place that counts, and a sentence of two lines (Hu et al. 2021, eq. 4)."
    assert first_sentence(Derived) == first

    class NoEnd:
        """Sentence without an end

        and another paragraph.
        """

    assert first_sentence(NoEnd) == "Sentence without an end"
    assert first_sentence(type("Bare", (), {})) == ""
