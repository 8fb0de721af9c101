"""Option --ranks of the command line, and what the ranks of a launcher do of a command."""

import os
from collections.abc import Sequence

from minitune.cli.verbs import HELP_WORDS, VERBS
from minitune.errors import InputError, quoted
from minitune.launch.ranks import launched

OPTION = "--ranks"
MOST = 1024  # processes on one machine: more is a slip of the finger


def ranks_asked(words: Sequence[str]) -> tuple[int, list[str]]:
    """(processes that --ranks asks for, 1 without it; the other words).

    InputError for what is no number of processes, and for a verb that runs no stages.
    """
    rest: list[str] = []
    given: list[str] = []
    for word in words:
        if rest and rest[-1] == OPTION:
            rest.pop()
            given.append(word)
        elif word.startswith(f"{OPTION}="):
            given.append(word.partition("=")[2])
        else:
            rest.append(word)
    if OPTION in rest:
        given.append("")
        rest.remove(OPTION)
    if not given:
        return 1, rest
    if len(given) > 1 or not given[0].isdecimal() or not 0 < int(given[0]) <= MOST:
        found = f"{OPTION} {', '.join(quoted(text) for text in given)}"
        wanted = f"expected one number of processes on this machine from 1 to {MOST}, as --ranks 2"
        raise InputError(f"minitune: {found}, {wanted}; correct it")
    verb = VERBS.get(rest[0]) if rest else None
    if not rest or (verb is not None and not verb.runs_stages):
        found = f"{OPTION} with {rest[0]}" if rest else f"{OPTION} without a program"
        raise InputError(f"minitune: {found}, expected a program to run; leave it out")
    return int(given[0]), rest


def is_for_first_rank(words: Sequence[str]) -> bool:
    """True for a command that only looks at something or prepares it, such as a verb or help."""
    verb = VERBS.get(words[0]) if words else None
    if verb is not None and verb.runs_stages:
        return False
    return not words or verb is not None or any(word in HELP_WORDS for word in words)


def is_first_rank() -> bool:
    """True in the first process of a run, and in the only one."""
    return launched(os.environ).rank == 0
