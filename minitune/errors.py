"""InputError, which every message to a user is raised as, and the hint that ends one about an unknown name."""

from collections.abc import Sequence
from difflib import get_close_matches


class InputError(ValueError):  # here and not in types: whatever imports torch takes longer than a message may
    """What a user wrote or pointed at is wrong; the command line prints the message alone, without a traceback."""


def nearest(name: str, known: Sequence[str]) -> str:
    """What ends a message about an unknown name: "; did you mean 'rank'?", or nothing when no known name is near."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
