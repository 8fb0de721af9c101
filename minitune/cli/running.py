"""Runs that the command line starts: a program, or the rest of one whose training is ended."""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from minitune.cli.model_folders import is_run
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.io.paths import user_path
from minitune.programs import program, run
from minitune.programs.ended import Chosen
from minitune.programs.program import Program
from minitune.programs.signals import Stopped, StopSignals


def run_file(file: Path, overrides: Sequence[str]) -> int:
    """Run or continue a program file; returns the exit code."""
    return _run(program.load(file, overrides), end=None)


def finish(words: Sequence[str]) -> int:
    """End the training of a run and run what comes after it; returns the exit code.

    InputError for what is no run folder, for a finished run, and without a state to finish with.
    """
    options = _finish_parser().parse_args(words)
    folder = user_path(options.run)
    if not is_run(folder):
        wanted = "expected the folder of a run, such as runs/lora"
        raise InputError(f"finish: {options.run} holds no manifest.json and program.toml, {wanted}")
    # The folder may have been moved since its program was written.
    place = {"name": folder.absolute().name, "out": str(folder.absolute().parent), "resume": None}
    began = msgspec.structs.replace(program.load(folder / "program.toml"), **place)
    return _run(began, end="best" if options.best else "newest")


def _finish_parser() -> OptionParser:
    done = "End the training of a stopped run where its newest saved state stands"
    description = f"{done}, and run the stages after it."
    epilog = "summary.json says at which step training was ended."
    parser = OptionParser("finish", description=description, epilog=epilog)
    parser.add_argument("run", metavar="RUN", help="the folder of the run, such as runs/lora")
    best = "go on with the best state, where evaluate keeps it"
    parser.add_argument("--best", action="store_true", help=best)
    return parser


def _run(chosen: Program, end: Chosen | None) -> int:
    stop = StopSignals()
    try:
        run.run_program(chosen, stop, end=end)
    except Stopped as stopped:
        place = f"stopped at step {stopped.step}, saved in {stopped.folder}"
        sys.stderr.write(f"{place}; run the same command to continue\n")
        return 128 + (stop.number or 0)
    return 0
