"""Command line: run a program, or look at one. Verbs that only look stay fast: torch is imported
where it is needed.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout

from minitune import __version__
from minitune.cli import help as help_text
from minitune.cli import verbs
from minitune.cli.command_result import CommandResult, write_failure, write_result
from minitune.cli.failures import DONE, INTERRUPTED, OUTPUT_CLOSED, failure
from minitune.cli.options import announced
from minitune.cli.ranks import is_first_rank, is_for_first_rank, ranks_asked
from minitune.cli.verbs import HELP_WORDS, VERBS
from minitune.launch.local import run_ranks

DEBUG = "--debug"
JSON = "--json"
RUN_WORDS = ("run", "train")  # people write them before the program, as other tools want it


def answer(argv: Sequence[str] | None = None) -> int:
    """Do what the words say and return the exit code; what goes wrong is one sentence on stderr.

    0: done. 2: the user must change something. 3: a disk is full. 1: a fault of minitune.
    128 + signal: stopped by one. With --json stdout has one line of JSON, and stderr all else.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = DEBUG in given, JSON in given
    words = [word for word in given if word not in (DEBUG, JSON)]
    _prepare_output()
    try:
        n_ranks, words = ranks_asked(words)
        if n_ranks > 1:
            flags = [word for word in given if word in (DEBUG, JSON)]
            return run_ranks(n_ranks, [sys.executable, "-m", "minitune", *words, *flags])
        if is_for_first_rank(words) and not is_first_rank():
            return DONE
        return _answer_as_json(words) if as_json else _run_words(words).code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # argparse, after it has printed the help of a verb
        return int(end.code or DONE)
    except BrokenPipeError as error:
        return OUTPUT_CLOSED if _drop_closed_stdout() else _fail(error, debug, as_json)
    except Exception as error:
        return _fail(error, debug, as_json)


def _prepare_output() -> None:
    """Make writing safe: a closed stdout swallows, characters that a terminal lacks are escaped."""
    if sys.stdout is None:
        # it stays open to the end
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _answer_as_json(words: list[str]) -> int:
    """Run a command whose lines go to stderr, and write what it found as JSON on stdout."""
    with redirect_stdout(sys.stderr or sys.stdout):
        answer = _run_words(words)
    write_result(answer)
    return answer.code


def _fail(error: Exception, debug: bool, as_json: bool) -> int:
    failed = failure(error)
    if sys.stderr is not None:
        trace = "".join(traceback.format_exception(error)) if debug else ""
        sys.stderr.write(f"{trace}{failed.message}\n")
    if as_json:
        write_failure(failed)
    return failed.code


def _drop_closed_stdout() -> bool:
    """True if the reader of the output, such as head, has gone; what is left is dropped."""
    try:
        # an empty line tells this pipe from another one that broke, such as a logger's
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, which would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run_words(words: list[str]) -> CommandResult:
    answer = _outcome(words)
    sys.stdout.flush()
    return answer


def _outcome(words: list[str]) -> CommandResult:
    if words[:1] == ["help"] and len(words) > 1:
        words = [*words[1:], HELP_WORDS[0]]
    if not words or words[0] in (*HELP_WORDS, "help"):
        return _told(help_text.overview())
    if words == ["--version"]:
        sys.stdout.write(f"minitune {__version__}\n")
        return CommandResult({"version": __version__})
    wants_help = any(word in HELP_WORDS for word in words[1:])
    if words[0] in RUN_WORDS and len(words) > 1 and "=" not in words[1]:
        words = words[1:]
    verb = VERBS.get(words[0])
    if verb is not None and wants_help and not verb.parses_help:
        return _told(help_text.verb_help(words[0]))
    if verb is not None:
        return verb.run(words[1:])
    file = verbs.program_file(words[0])
    if wants_help:
        return _told(help_text.program_help(words[0], file))
    if is_first_rank():
        announced(file)
    from minitune.cli.running import run_file  # torch comes with it

    return run_file(file, words[1:])


def _told(text: str) -> CommandResult:
    """Text on stdout, and as an answer."""
    sys.stdout.write(text)
    return CommandResult({"text": text})
