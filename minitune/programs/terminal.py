"""Terminal of a run."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console

FILE_CHARACTERS = 120  # of a line of what is no terminal


def terminal() -> Console:
    """Console on standard output; a file or a pipe has room for a whole table."""
    console = Console(file=cast("IO[str]", _Terminal()))
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_CHARACTERS
    return console


class _Terminal:
    """Standard output that goes silent once it can't be written, so that a run outlives its
    terminal or pipe."""

    def __init__(self) -> None:
        self._is_open = True

    def write(self, text: str) -> int:
        if self._is_open:
            self._if_open(lambda: sys.stdout.write(text))
        return len(text)

    def flush(self) -> None:
        if self._is_open:
            self._if_open(sys.stdout.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def _if_open(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError:
            # A reader such as head has gone, or the terminal was closed: what Python still has to
            # flush at its end goes nowhere.
            self._is_open = False
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
