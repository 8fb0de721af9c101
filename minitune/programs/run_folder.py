"""Run folders: the resolved program, a manifest, records, the lock that keeps two runs apart."""

import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from minitune.errors import DiskFullError, InputError
from minitune.io import locks, paths
from minitune.io.atomic import NO_ROOM, create_folder, link, sync, write_atomic
from minitune.io.results import Record
from minitune.programs import ended
from minitune.programs.earlier_run import EarlierRun, changed_input, earlier_run, gone_result
from minitune.programs.ended import Chosen, Ended
from minitune.programs.log import LINES
from minitune.programs.manifest import (
    Start,
    manifest_of,
    read_manifest,
    this_start,
    version_changes,
)
from minitune.programs.profiling.table import take_over
from minitune.programs.program import Program, WrittenProgram
from minitune.programs.records import read_rows, read_summary, write_record
from minitune.programs.stages.training_stage import TrainingStage
from minitune.trackers.tracker import TRACKER_FILES

ROWS = "metrics.jsonl"


class Run(NamedTuple):
    """Opened run folder: nobody else trains in it until the lock file is closed."""

    folder: Path
    resumed: bool
    records: dict[str, Record]  # of the stages that were finished before
    notes: tuple[str, ...]  # for the user
    lock: locks.Lock
    summary: Record | None = None  # of a run that is finished: there is nothing left to run
    ended: Mapping[str, Ended] = MappingProxyType({})  # training stages that were ended early


def open_run(asked: WrittenProgram, *, end: Chosen | None = None) -> Run:
    """Lock out/name and make it this program's folder: continue what is there as far as it is the
    program's, or move it aside and begin afresh.

    A run that this program finished on the same inputs is returned with its summary, as it is: a
    scheduler that gives a command again means no second training. Nothing is ever deleted.
    end: training is to end with the newest or the best state that is saved. InputError when another
    trainer holds the folder, when it is no run folder, when its inputs changed since it began, and
    when resume = true finds nothing to continue.
    """
    program = asked.program
    out = _out_folder(program.out)
    folder = out / program.name
    # not inside the folder, which may be moved aside
    lock, lock_notes = _lock(out / f".{program.name}.lock", folder)
    try:
        run = _open_locked(asked, folder, lock)
        if end is not None:
            run = _with_training_ended(run, program, end)
    except BaseException:
        lock.close()
        raise
    return run._replace(notes=(*lock_notes, *run.notes))


def _open_locked(asked: WrittenProgram, folder: Path, lock: locks.Lock) -> Run:
    program = asked.program
    _recover(folder)
    exists = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    if exists and not (folder / "manifest.json").is_file():
        remedy = "change name or out, or move it away"
        raise InputError(f"runs: {folder} holds no manifest.json, expected a run folder; {remedy}")
    if not exists:
        return _begun(asked, folder, lock, "does not exist")
    if program.resume is False:
        obstacle = "is not to be continued (resume = false)"
        return _begun(asked, folder, lock, obstacle)
    earlier = earlier_run(program, folder)
    changed = changed_input(program, earlier)
    if changed is not None and not earlier.is_finished:
        found = f"{changed} is not what it was when {folder} began"
        remedy = "restore it, or set resume = false"
        raise InputError(f"runs: {found}, expected the same file; {remedy}")
    if changed is not None:
        obstacle = f"is finished, and {changed} is not what it was when it began"
        return _begun(asked, folder, lock, obstacle)
    gone = gone_result(program, folder) if earlier.is_finished else None
    if earlier.is_finished and earlier.changes.first is None and gone is None:
        return _finished(earlier, lock)
    if earlier.continues_here:
        return _continued(asked, earlier, lock, gone)
    obstacle = f"holds another program ({earlier.changes.first})"
    return _begun(asked, folder, lock, obstacle, earlier)


def _begun(
    asked: WrittenProgram,
    folder: Path,
    lock: locks.Lock,
    obstacle: str,
    earlier: EarlierRun | None = None,
) -> Run:
    """Fresh run, with what holds of an earlier one; what lies in its folder is moved aside.

    InputError if resume = true and nothing is kept.
    """
    kept = earlier.kept if earlier is not None else []
    if asked.program.resume and not kept:
        wanted = "expected an unfinished run to resume; drop resume = true"
        raise InputError(f"runs: {folder} {obstacle}, {wanted}")
    new = _prepared(asked, folder, earlier)
    notes = ()
    if folder.is_dir() and any(folder.iterdir()):
        numbered = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
        aside = next(path for path in numbered if not path.exists())
        folder.rename(aside)
        goes_on = f"; what holds of it goes on here: {', '.join(kept)}" if kept else ""
        notes = (f"{folder} {obstacle}: moved to {aside}{goes_on}",)
    new.rename(folder)
    sync(folder.parent)
    if earlier is None:
        return Run(folder, False, {}, notes, lock)
    records, early = earlier.held(earlier.records), earlier.held(earlier.ended)
    return Run(folder, bool(kept), records, notes, lock, ended=early)


def _recover(folder: Path) -> None:
    """Give a prepared run its name, if the machine went down after the earlier one was moved."""
    new = _new_folder(folder)
    if not os.path.lexists(folder) and (new / "manifest.json").is_file():
        new.rename(folder)
        sync(folder.parent)


def _out_folder(path: str) -> Path:
    """Folder of all runs, made if it is not there; InputError for a path where none can be."""
    out = paths.user_path(path)
    try:
        create_folder(out)
    except OSError as error:
        found = f"can't be made ({error.strerror})"
        said = f"runs: out {path!r} {found}, expected a folder; change out"
        raise _refusal(error)(said) from None
    return out


def _prepared(asked: WrittenProgram, folder: Path, earlier: EarlierRun | None) -> Path:
    """Run folder under another name, so that under its own it exists whole or not at all."""
    new = _new_folder(folder)
    shutil.rmtree(new, ignore_errors=True)  # one left by a kill: the lock is ours
    (new / "checkpoints").mkdir(parents=True)
    starts: tuple[Start, ...] = ()
    records: dict[str, Record] = {}
    if earlier is not None and earlier.kept:
        records, starts = earlier.held(earlier.records), read_manifest(folder).starts
        _take_over(earlier, new)
    write_atomic(new / "program.toml", asked.text.encode())
    write_record(new / "records.json", records)
    # The manifest comes last: it says that the folder is whole.
    write_record(new / "manifest.json", manifest_of(asked, *starts, this_start()))
    return new


def _take_over(earlier: EarlierRun, new: Path) -> None:
    """Put what holds of an earlier run into a new folder; saved states take no second room."""
    for label in earlier.taken:
        if label in earlier.changes.states:
            source, target = earlier.folder / "checkpoints" / label, new / "checkpoints" / label
            shutil.copytree(source, target, copy_function=link)
    rows = [line for stage, _, line in read_rows(earlier.folder / ROWS) if stage in earlier.kept]
    write_atomic(new / ROWS, b"".join(rows))
    if early := earlier.held(earlier.ended):
        write_record(new / ended.FILE, msgspec.to_builtins(early))
    take_over(earlier.folder, new, earlier.kept)
    for name in (LINES, *TRACKER_FILES):
        if (earlier.folder / name).is_file():
            shutil.copyfile(earlier.folder / name, new / name)


def _new_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _continued(
    asked: WrittenProgram,
    earlier: EarlierRun,
    lock: locks.Lock,
    gone: Path | None,
) -> Run:
    folder, first = earlier.folder, earlier.changes.first
    manifest, start = read_manifest(folder), this_start()
    changed = version_changes(manifest.starts[-1], start)
    notes = (_going_on(earlier, gone),)
    if changed:
        may_differ = "it may not continue bit for bit"
        notes += (f"versions changed since it was stopped ({changed}): {may_differ}",)
    if first is not None:
        notes += (f"the program has changed: {first}",)
    records, early = earlier.held(earlier.records), earlier.held(earlier.ended)
    # Without its summary the run counts as unfinished, whatever comes.
    (folder / "summary.json").unlink(missing_ok=True)
    write_record(folder / "records.json", records)
    if early != earlier.ended:
        write_record(folder / ended.FILE, msgspec.to_builtins(early))
    write_record(folder / "manifest.json", manifest_of(asked, *manifest.starts, start))
    write_atomic(folder / "program.toml", asked.text.encode())
    return Run(folder, True, records, notes, lock, ended=early)


def _going_on(earlier: EarlierRun, gone: Path | None) -> str:
    if not earlier.is_finished:
        return f"{earlier.folder} is unfinished: continuing it"
    if gone is not None:
        return f"{earlier.folder} is finished, but its result {gone} is gone: making it again"
    return f"{earlier.folder} is finished: running what has changed after its training"


def _finished(earlier: EarlierRun, lock: locks.Lock) -> Run:
    summary = read_summary(earlier.folder / "summary.json")
    note = f"{earlier.folder} is finished: nothing is left to run; resume = false begins afresh"
    if earlier.ended:
        steps = ", ".join(f"{label} at step {end.step}" for label, end in earlier.ended.items())
        note += f", and resume = true continues the training that was ended early ({steps})"
    return Run(earlier.folder, True, {}, (note,), lock, summary, ended=earlier.ended)


def _with_training_ended(run: Run, program: Program, chosen: Chosen) -> Run:
    """Run whose first unfinished training stage ends where it stands; InputError if none can."""
    if run.summary is not None:
        found = f"{run.folder} is finished"
        raise InputError(f"runs: {found}, expected a run whose training can end; nothing to do")
    training = {stage.label: stage for stage in program.stage if isinstance(stage, TrainingStage)}
    new = ended.end_training(run.folder, training, {**run.records, **run.ended}, chosen)
    all_ended = {**run.ended, **new}
    write_record(run.folder / ended.FILE, msgspec.to_builtins(all_ended))
    return run._replace(ended=all_ended)


def _lock(path: Path, folder: Path) -> tuple[locks.Lock, tuple[str, ...]]:
    """(lock of a run folder, notes for the user); InputError if another process trains in it."""
    try:
        return locks.acquire(path), ()
    except locks.Busy as busy:
        raise InputError(
            f"runs: {folder} is in use by {busy.holder}, expected one trainer a folder; wait, or "
            "change name"
        ) from None
    except locks.Unsupported as reason:
        note = f"{path} can't be locked ({reason}): start no second run of this name now"
        return locks.Lock(None, locks.holder_file(path)), (note,)
    except OSError as error:
        found = f"can't be locked ({error})"
        raise _refusal(error)(f"runs: {path} {found}, expected a file; change out") from None


def _refusal(error: OSError) -> type[InputError]:
    """Kind of a message: a full disk has an exit code of its own."""
    return DiskFullError if error.errno in NO_ROOM else InputError
