"""Runs that the command line starts: a program, or the rest of one whose training is ended."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from minitune.cli.command_result import CommandResult
from minitune.cli.model_folders import open_model_folder, require_folder, with_model
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.io.paths import user_path
from minitune.programs import program, run
from minitune.programs.ended import Chosen
from minitune.programs.loading import ModelSource
from minitune.programs.manifest import read_manifest
from minitune.programs.program import Program, WrittenProgram
from minitune.programs.signals import Stopped, StopSignals
from minitune.programs.stages.save import Save
from minitune.programs.trained_state import is_run
from minitune.registry.names import spelled_out


def run_file(file: Path, overrides: Sequence[str]) -> CommandResult:
    """Run or continue a program file; returns its folder and its summary."""
    return _run(program.read(file, with_model(overrides, file.stem)), end=None)


def finish(words: Sequence[str]) -> CommandResult:
    """End the training of a run and run what comes after it; returns its folder and summary.

    InputError for what is no run folder, for a finished run, and without a state to finish with.
    """
    options = _finish_parser().parse_args(words)
    require_folder(options.run, "finish", "the folder of a run, such as runs/lora")
    folder = user_path(options.run)
    if not is_run(folder):
        wanted = "expected the folder of a run, such as runs/lora"
        raise InputError(f"finish: {options.run} holds no manifest.json and program.toml, {wanted}")
    # The folder may have been moved since its program was written.
    named = folder if folder.name not in ("", "..") else folder.resolve()
    place = {"name": named.name, "out": str(named.parent), "resume": None}
    # Those of now come first: a token may be a new one.
    variables = {**read_manifest(folder).variables, **os.environ}
    began = program.read(folder / "program.toml", variables=variables)
    moved = began._replace(program=msgspec.structs.replace(began.program, **place))
    return _run(moved, end="best" if options.best else "newest")


def _finish_parser() -> OptionParser:
    done = "End the training of a stopped run where its newest saved state stands"
    description = f"{done}, and run the stages after it."
    epilog = "summary.json says at which step training was ended."
    parser = OptionParser("finish", description=description, epilog=epilog)
    parser.add_argument("run", metavar="RUN", help="the folder of the run, such as runs/lora")
    best = "go on with the best state, where evaluate keeps it"
    parser.add_argument("--best", action="store_true", help=best)
    return parser


def merge(words: Sequence[str]) -> CommandResult:
    """Merge an adapter into its base and write a model folder, as a run; returns its summary.

    InputError for a folder without deltas, and for a base that is not here.
    """
    options = _merge_parser().parse_args(words)
    word = require_folder(options.adapter, "merge", "an adapter, a run or a training state")
    folder = open_model_folder(word, None, "merge")
    base, deltas = spelled_out(options.base or folder.model), folder.adapter
    if deltas is None:
        wanted = "expected an adapter, a run or a training state"
        is_result = folder.model != word
        holds = f"has saved a whole model, {folder.model}" if is_result else "holds no deltas"
        raise InputError(f"merge: {options.adapter} {holds}, {wanted}; nothing to merge")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", user_path(options.adapter).absolute().name)
    stage = Save(what="merged", path=options.to, onto=options.onto, dtype=options.dtype)
    source = ModelSource(path=base, deltas=deltas)
    made = Program(name=f"merge-{name}", model=source, stage=(stage,))
    return _run(WrittenProgram(made), end=None)


def _merge_parser() -> OptionParser:
    description = "Fold an adapter into its base and write a model folder that all tools open."
    epilog = "The folder is runs/merge-NAME/merged unless --to names another."
    parser = OptionParser("merge", description=description, epilog=epilog)
    adapter = "an adapter, a run folder, or a training state in its checkpoints"
    parser.add_argument("adapter", metavar="ADAPTER", help=adapter)
    parser.add_argument("--base", metavar="FOLDER", help="its base, if that has been moved")
    parser.add_argument("--to", metavar="FOLDER", help="a new folder to write")
    dtypes = ("float32", "bfloat16", "float16")
    as_stored = "of the new weights (default: as the base stores them)"
    parser.add_argument("--dtype", choices=dtypes, help=as_stored)
    onto = "trained: only what the deltas trained on; stored: the dense weights, after QLoRA"
    parser.add_argument("--onto", choices=("trained", "stored"), default="trained", help=onto)
    return parser


def _run(asked: WrittenProgram, end: Chosen | None) -> CommandResult:
    """Folder and summary of a run; of one that a signal stopped, the step that is saved."""
    stop = StopSignals()
    chosen = asked.program
    folder = str(Path(chosen.out) / chosen.name)
    try:
        summary = run.run_program(chosen, stop, end=end, written=asked.written)
    except Stopped as stopped:
        place = f"stopped at step {stopped.step}, saved in {stopped.folder}"
        sys.stderr.write(f"{place}; run the same command to continue\n")
        return CommandResult(
            {"folder": folder, "stopped_at_step": stopped.step}, 128 + (stop.number or 0)
        )
    return CommandResult({"folder": folder, "summary": summary})
