"""Command line: run a program, or look at one. Verbs that only look stay fast: torch is imported
where it is needed.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Never

from minitune import __version__
from minitune.cli import help as help_text
from minitune.cli import verbs
from minitune.cli.failures import DONE, INTERRUPTED, OUTPUT_CLOSED, failure
from minitune.cli.options import announced
from minitune.cli.verbs import HELP_WORDS, VERBS

DEBUG = "--debug"
RUN_WORDS = ("run", "train")  # people write them before the program, as other tools want it


def start() -> Never:
    """Run the command line and end the process with its exit code, also if Ctrl-C comes late."""
    try:
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say and return the exit code; what goes wrong is one sentence on stderr.

    0: done. 2: the user must change something. 3: a disk is full. 1: a fault of minitune.
    128 + signal: stopped by one.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    _prepare_output()
    try:
        code = _run_words(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # argparse, after it has printed the help of a verb
        return int(end.code or DONE)
    except BrokenPipeError as error:
        return OUTPUT_CLOSED if _drop_closed_stdout() else _fail(error, debug)
    except Exception as error:
        return _fail(error, debug)


def _prepare_output() -> None:
    """Make writing safe: a closed stdout swallows, characters that a terminal lacks are escaped."""
    if sys.stdout is None:
        # it stays open to the end
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _fail(error: Exception, debug: bool) -> int:
    code, message = failure(error)
    if sys.stderr is not None:
        trace = "".join(traceback.format_exception(error)) if debug else ""
        sys.stderr.write(f"{trace}{message}\n")
    return code


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


def _run_words(words: list[str]) -> int:
    if words[:1] == ["help"] and len(words) > 1:
        words = [*words[1:], HELP_WORDS[0]]
    if not words or words[0] in (*HELP_WORDS, "help"):
        sys.stdout.write(help_text.overview())
        return DONE
    if words == ["--version"]:
        sys.stdout.write(f"minitune {__version__}\n")
        return DONE
    wants_help = any(word in HELP_WORDS for word in words[1:])
    if words[0] in RUN_WORDS and len(words) > 1 and "=" not in words[1]:
        words = words[1:]
    verb = VERBS.get(words[0])
    if verb is not None and wants_help and not verb.parses_help:
        sys.stdout.write(help_text.verb_help(words[0]))
        return DONE
    if verb is not None:
        return verb.run(words[1:])
    file = verbs.program_file(words[0])
    if wants_help:
        sys.stdout.write(help_text.program_help(words[0], file))
        return DONE
    announced(file)
    from minitune.cli.running import run_file  # torch comes with it

    return run_file(file, words[1:])


if __name__ == "__main__":
    start()
