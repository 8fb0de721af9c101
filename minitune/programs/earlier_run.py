"""Run that lies in the folder of a program, and how much of its work still holds."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minitune.checkpoint.state import list_states, state_step
from minitune.errors import InputError
from minitune.io import paths, toml
from minitune.io.results import Record
from minitune.programs.ended import Ended, read_ended
from minitune.programs.manifest import input_records, read_manifest
from minitune.programs.program import Program, read, resolved
from minitune.programs.program_changes import Changes, compare
from minitune.programs.records import REMEDY, read_records
from minitune.programs.state import WritingStage

T = TypeVar("T")


class EarlierRun(NamedTuple):
    """Run that lies in the folder of a program, and what of it holds under that program."""

    folder: Path
    records: dict[str, Record]
    taken: dict[str, int]  # steps behind the newest state, by stage; 0 for other saved work
    ended: dict[str, Ended]
    is_finished: bool
    changes: Changes

    @property
    def kept(self) -> list[str]:
        """Stages whose work holds, be it finished or to go on."""
        done = [label for label in self.records if label in self.changes.finished]
        states = [label for label in self.taken if label in self.changes.states]
        return list(dict.fromkeys((*done, *states)))

    def held(self, by_stage: Mapping[str, T]) -> dict[str, T]:
        """Part of the values by stage that belongs to stages whose work holds as it is."""
        done = self.changes.finished
        return {label: value for label, value in by_stage.items() if label in done}

    @property
    def continues_here(self) -> bool:
        """True if the run goes on in its folder, where nothing is lost by it."""
        if self.changes.first is None:
            return True
        is_lost = any(label not in self.changes.states for label in self.taken)
        replaces_results = self.is_finished and self.changes.retrains
        return bool(self.kept) and not is_lost and not replaces_results


def earlier_run(program: Program, folder: Path) -> EarlierRun:
    """Run in a folder, compared with a program; InputError for files that no run wrote."""
    path = folder / "program.toml"
    before = _program_of_run(path, read_manifest(folder).variables)
    records = read_records(folder / "records.json")
    early = read_ended(folder)
    taken = {}
    for place in sorted((folder / "checkpoints").glob("*")):
        if place.is_dir() and any(place.iterdir()):
            steps = [state_step(state) for state in list_states(place)]
            taken[place.name] = max(steps, default=0)
    again = frozenset(early) if program.resume else frozenset()
    try:
        now = toml.parse(resolved(program), "runs: the program")
        changes = compare(before, now, taken, again)
    except (AttributeError, KeyError, TypeError) as error:
        found = f"is no program that a run wrote ({error!r})"
        raise InputError(f"runs: {path} {found}, expected TOML of one; {REMEDY}") from None
    is_finished = (folder / "summary.json").exists()
    return EarlierRun(folder, records, taken, early, is_finished, changes)


def _program_of_run(path: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Resolved program of a run, with the keys that minitune has got since then at their defaults.

    variables: that it was run with; those of [log] are what they are now.

    As it stands where this version decodes it no more.
    """
    text = _read(path).decode("utf-8", "replace")
    written = toml.parse(text, f"runs: {path}")
    try:
        began = read(path, variables={**os.environ, **variables}).program
        return toml.parse(resolved(began), f"runs: {path}")
    except InputError:
        return written


def gone_result(program: Program, folder: Path) -> Path | None:
    """First result of a finished run that is not there any more."""
    writing = [stage for stage in program.stage if isinstance(stage, WritingStage)]
    results = [paths.locate(stage.result.path, folder) for stage in writing]
    return next((path for path in results if not path.exists()), None)


def changed_input(program: Program, earlier: EarlierRun) -> str | None:
    """Name of the first input that is not what the manifest says; None if all are. A copy's time
    may differ, and an input that only one of the two programs has is told as their difference."""
    inputs, manifest = input_records(program), read_manifest(earlier.folder)
    is_same_program = earlier.changes.first is None
    for name in {**inputs, **manifest.inputs}:
        if not is_same_program and not (name in inputs and name in manifest.inputs):
            continue
        before, now = (tree.get(name, {}) | {"time": None} for tree in (manifest.inputs, inputs))
        if before != now:
            return name
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        found = f"{path} can't be read ({error})"
        wanted = "expected a run folder's file; set resume = false"
        raise InputError(f"runs: {found}, {wanted}") from None
