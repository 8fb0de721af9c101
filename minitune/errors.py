"""InputError, which every message to a user is raised as, and the names that a message about an
unknown one offers.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

MAX_QUOTED = 100  # characters of an input that a message repeats
MAX_MESSAGE = 3000  # characters of a message
RANK_LOST = 4  # exit code of a process that ended because another one of its run did


# here and not in types: whatever imports torch takes longer than a message may
class InputError(ValueError):
    """Mistake in what a user wrote or pointed at; the command line prints the message alone,
    without a traceback.

    Names and texts come from files that anyone may have written. So a message is one line that
    moves no cursor and colours no terminal, and that ends, whatever it repeats of them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(cut(message, MAX_MESSAGE)))


class DiskFullError(InputError):
    """Disk or quota without room for what was written; it has an exit code of its own."""


class RankLostError(Exception):
    """Loss of another process of the same run: that one says why it ended."""


def nearest(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: "; did you mean 'rank'?", or nothing when no known
    name is near.
    """
    near = [one for one in closest(name, known, 8, cutoff=0.5) if _is_misspelled(name, one)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_misspelled(name: str, known: str) -> bool:
    """True where a name can be meant by another one: all words of the shorter are words of the
    longer, or few letters differ. A common ending alone (rpo_alpha, neftune_alpha) says nothing.
    """
    words, others = (set(re.split(r"[\W_]+", one.casefold())) for one in (name, known))
    if words <= others or others <= words:
        return True
    return _n_edits(name.casefold(), known.casefold()) <= max(1, len(name) // 3)


def _n_edits(a: str, b: str) -> int:
    """Letters to write, to drop, to exchange, or to swap with the next, that make one text of the
    other (optimal string alignment).
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            edits = min(above[j] + 1, row[-1] + 1, above[j - 1] + (char != other))
            if i > 1 and j > 1 and (char, other) == (b[j - 2], a[i - 2]):
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
        before = above
    return row[-1]


def closest(name: str, known: Sequence[str], n: int, *, cutoff: float) -> list[str]:
    """At most n of the known names that resemble a name, the most similar first; cutoff in [0, 1]
    is the least similarity.
    """
    return get_close_matches(name, known, n=n, cutoff=cutoff)


def quoted(value: Any) -> str:
    """Text of a value for a message, cut to MAX_QUOTED characters: an input can have megabytes.

    An exception is quoted by its message, anything else as repr() writes it.
    """
    if isinstance(value, BaseException):
        return cut(str(value))
    short = Repr()
    short.maxstring = short.maxlong = short.maxother = MAX_QUOTED
    return cut(short.repr(value))


def cut(text: str, length: int = MAX_QUOTED) -> str:
    """Text of at most so many characters: a longer one loses its middle."""
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[: half - 3]} ... {text[-half + 2 :]}"


def printable(text: str) -> str:
    """Text whose characters that do not show, such as line ends and escapes, are written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
