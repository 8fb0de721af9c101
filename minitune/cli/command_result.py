"""Verbs and their results: what a command found, as the option --json writes it."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from minitune.cli.failures import DONE, Failure


class CommandResult(NamedTuple):
    """End of a command: what it found, as JSON takes it, and its exit code."""

    value: Any
    code: int = DONE


class Verb(NamedTuple):
    """Word that runs no program; `run` takes the words after it and returns what it found."""

    usage: str
    summary: str
    run: Callable[[Sequence[str]], CommandResult]
    details: str = ""
    parses_help: bool = False  # its own parser knows --help, with every option
    runs_stages: bool = False  # so that every rank of a launcher takes part


def write_result(answer: CommandResult) -> None:
    """Write {"exit_code": ..., "result": ...} on stdout, in one line."""
    _write({"exit_code": answer.code, "result": answer.value})


def write_failure(failed: Failure) -> None:
    """Write {"exit_code": ..., "error": the sentence} on stdout, in one line."""
    _write({"exit_code": failed.code, "error": failed.message})


def _write(content: dict[str, Any]) -> None:
    # a number that is not finite is null: JSON has no word for it
    line = msgspec.json.encode(content, enc_hook=str).decode()
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
