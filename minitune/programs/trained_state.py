"""Newest training state of a run, found without reading a weight: what it trained, and on what.

It imports no torch, so that `inspect` stays fast.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.io import toml
from minitune.io.json_file import read_json_object
from minitune.io.state_files import tensor_files
from minitune.programs.variables import NOT_STORED, expanded

RUN_FILES = ("manifest.json", "program.toml")
STEP = re.compile(r"step-(\d{8,})")
# Stages that change the weights that deltas train on, so that no folder holds them.
NEW_WEIGHTS = ("merge", "load")


class TrainedState(NamedTuple):
    """Saved state of a training stage, with the program that made it."""

    folder: Path  # step-N
    run: Path
    stage: Mapping[str, Any]  # the table of the training stage
    before: tuple[Mapping[str, Any], ...]  # those of the stages before it
    model: Mapping[str, Any]  # the table [model]

    @property
    def label(self) -> str:
        """Name of the training stage."""
        return _label(self.stage)

    @property
    def step(self) -> int:
        """Steps that the state has behind it."""
        return int(self.folder.name.removeprefix("step-"))

    @property
    def lora(self) -> Mapping[str, Any] | None:
        """Table of the lora stage whose deltas train; None where weights train whole."""
        return next((table for table in reversed(self.before) if table["op"] == "lora"), None)

    @property
    def quantize(self) -> Mapping[str, Any] | None:
        """Table of the stage that quantized the weights under the deltas, if one did."""
        return next((table for table in self.before if table["op"] == "quantize"), None)

    @property
    def base(self) -> str:
        """Folder of the model as the program writes it; InputError if no folder holds what was
        trained."""
        change = next((_label(table) for table in self.before if table["op"] in NEW_WEIGHTS), None)
        if self.stage.get("sweep") is not None:
            found = f"{self.label} of {self.run} trains many adapters at once"
            remedy = f"end it with `minitune finish {self.run}`, which saves the best"
            raise InputError(f"runs: {found}, expected one; {remedy}")
        if change is not None or self.model.get("path") is None:
            made = f"stage {change}" if change is not None else "[model] config"
            found = f"{self.label} of {self.run} trains weights that {made} made"
            remedy = f"end it with `minitune finish {self.run}` and open what it saves"
            raise InputError(f"runs: {found}, expected those of a folder; {remedy}")
        return str(self.model["path"])

    def describe(self) -> str:
        """State in words: "runs/x, train at step 11"."""
        return f"{self.run}, {self.label} at step {self.step}"


def is_run(folder: Path) -> bool:
    """True for a run folder."""
    return all((folder / name).is_file() for name in RUN_FILES)


def heldout_table(run: Path) -> tuple[str, Mapping[str, Any] | None]:
    """(name, table) of the rows that a run measures on: those of its evaluations while it trains,
    else of its last eval stage; (name, None) where it has none."""
    program = _program(run)
    stages, tables = program["stage"], program.get("data", {})
    evaluated = [stage["evaluate"] for stage in stages if isinstance(stage.get("evaluate"), dict)]
    measured = [*evaluated, *(stage for stage in reversed(stages) if stage["op"] == "eval")]
    names = [str(table.get("data")) for table in measured]
    name = next((name for name in names if name in tables), "heldout")
    return name, tables.get(name)


def trained_state(folder: Path) -> TrainedState | None:
    """Newest state of a run folder, or the state that a folder step-N is; None for another folder.

    Newest is the last step of the last training stage that has begun.
    """
    if is_run(folder):
        tables = _program(folder).get("stage", [])
        for n, table in reversed(list(enumerate(tables))):
            steps = (folder / "checkpoints" / _label(table)).glob("step-*")
            states = [path for path in steps if _is_state(path)]
            if table["op"] == "train" and states:
                newest = max(states, key=lambda path: (len(path.name), path.name))
                return _state(newest, folder, n)
        return None
    if not _is_state(folder):
        return None
    # checkpoints/train/step-N or checkpoints/train/best/step-N
    stage = folder.absolute().parent
    stage = stage.parent if stage.name == "best" else stage
    run = stage.parent.parent
    if not is_run(run):
        return None
    labels = [_label(table) for table in _program(run).get("stage", [])]
    return _state(folder, run, labels.index(stage.name)) if stage.name in labels else None


def _state(folder: Path, run: Path, n: int) -> TrainedState:
    program = _program(run)
    tables = program["stage"]
    return TrainedState(folder, run, tables[n], tuple(tables[:n]), program["model"])


def _is_state(path: Path) -> bool:
    return STEP.fullmatch(path.name) is not None and bool(tensor_files(path))


def _label(table: Mapping[str, Any]) -> str:
    return str(table.get("name", table["op"]))


def _program(run: Path) -> dict[str, Any]:
    """Program of a run as plain values, with the variables that it was run with; InputError for a
    file that no run wrote."""
    path = run / "program.toml"
    written = toml.read(path, "runs")[1]
    manifest = read_json_object(run / "manifest.json", "runs", optional=True)
    variables = {**os.environ, **manifest.get("variables", {})}
    # What trackers were told may name variables that are not set here.
    parts = {key: value for key, value in written.items() if key != NOT_STORED}
    program = expanded(parts, (), lambda _: f"runs: {path}", variables)
    stages = program.get("stage")
    tables = [table for table in stages or [] if isinstance(table, dict) and "op" in table]
    if tables != stages or not isinstance(program.get("model"), dict):
        found = f"{path} is no program that a run wrote"
        raise InputError(f"runs: {found}, expected [model] and stages")
    return program
