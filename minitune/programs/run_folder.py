"""Run folders: the resolved program, a manifest, records, and the lock that keeps two runs apart."""

import os
import platform
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from minitune import __version__
from minitune.errors import InputError
from minitune.io import locks, paths, toml
from minitune.io.atomic import create_folder, sync, write_atomic
from minitune.io.json_file import read_json
from minitune.io.results import Record, file_record, hashed_record, iso_time
from minitune.io.toml_messages import KeyPath, shown
from minitune.programs import save_paths
from minitune.programs.program import Program
from minitune.programs.records import REMEDY, read_records, read_summary

PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "msgspec", "wandb")
NOT_THE_RUN = ("log", "resume", "out")  # keys of a program that may change while a run goes on


class Start(msgspec.Struct, frozen=True):
    """When, where and with what a run was begun or continued."""

    time: str
    host: str
    pid: int
    versions: dict[str, str]


class Manifest(msgspec.Struct, frozen=True):
    """Inputs and origin of a run; inputs: by path, "sha256" and "bytes", or "bytes" and "time" for large weights."""

    seed: int
    inputs: dict[str, Record]
    starts: Annotated[tuple[Start, ...], msgspec.Meta(min_length=1)]


class Run(NamedTuple):
    """Opened run folder: nobody else trains in it until the lock file is closed."""

    folder: Path
    resumed: bool
    records: dict[str, Record]  # of the stages that were finished before
    notes: tuple[str, ...]  # for the user
    lock: locks.Lock
    summary: Record | None = None  # of a run that is finished: there is nothing left to run


def open_run(program: Program, *, program_text: str) -> Run:
    """Lock out/name and make it this program's folder: continue it, or move what is there aside and begin afresh.

    A run that this program finished on the same inputs is returned with its summary, as it is: a
    scheduler that gives a command again means no second training. Nothing is ever deleted.
    InputError when another trainer holds the folder, when it is no run folder, when its inputs
    changed since it began, and when resume = true finds nothing to continue.
    """
    out = _out_folder(program.out)
    folder = out / program.name
    # not inside the folder, which may be moved aside
    lock, lock_notes = _lock(out / f".{program.name}.lock", folder)
    try:
        run = _open_locked(program, program_text, folder, lock)
    except BaseException:
        lock.close()
        raise
    return run._replace(notes=(*lock_notes, *run.notes))


def _open_locked(program: Program, program_text: str, folder: Path, lock: locks.Lock) -> Run:
    exists = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    if exists and not (folder / "manifest.json").is_file():
        remedy = "change name or out, or move it away"
        raise InputError(f"runs: {folder} holds no manifest.json, expected a run folder; {remedy}")
    obstacle = _obstacle(folder, program_text, program.resume) if exists else "does not exist"
    if obstacle is None and not (folder / "summary.json").exists():
        return _continued(program, program_text, folder, lock)
    if obstacle is None:
        obstacle = _change_since_end(program, folder)
    if obstacle is None:
        return _finished(folder, lock)
    if program.resume:
        wanted = "expected an unfinished run to resume; drop resume = true"
        raise InputError(f"runs: {folder} {obstacle}, {wanted}")
    new = _prepared(program, program_text, folder)
    notes = ()
    if exists:
        numbered = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
        aside = next(path for path in numbered if not path.exists())
        folder.rename(aside)
        notes = (f"{folder} {obstacle}: moved to {aside}",)
    new.rename(folder)
    sync(folder.parent)
    return Run(folder, False, {}, notes, lock)


def _out_folder(path: str) -> Path:
    """Folder of all runs, made if it is not there; InputError for a path where none can be."""
    out = paths.user_path(path)
    try:
        create_folder(out)
    except OSError as error:
        found = f"can't be made ({error.strerror})"
        raise InputError(f"runs: out {path!r} {found}, expected a folder; change out") from None
    return out


def _obstacle(folder: Path, program_text: str, resume: bool | None) -> str | None:
    """Why a run folder is not to be continued by this program, in words; None if it is."""
    if resume is False:
        return "is not to be continued (resume = false)"
    before = toml.parse(_read(folder / "program.toml").decode("utf-8", "replace"), f"runs: {folder / 'program.toml'}")
    now = toml.parse(program_text, "runs: the program")
    for tree in (before, now):
        for key in NOT_THE_RUN:
            tree.pop(key, None)
    return _difference(before, now, ())


def _difference(before: Any, now: Any, path: KeyPath) -> str | None:
    if type(before) is not type(now) or not isinstance(now, (dict, list)):
        return None if before == now else f"holds another program ({shown(path)} is {before!r} there and {now!r} here)"
    if isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    for key in before | now:
        if key not in before or key not in now:
            return f"holds another program ({shown((*path, key))} stands only {'here' if key in now else 'there'})"
        difference = _difference(before[key], now[key], (*path, key))
        if difference is not None:
            return difference
    return None


def _prepared(program: Program, program_text: str, folder: Path) -> Path:
    """Fresh run folder under another name, so that under its own it exists whole or not at all."""
    new = folder.with_name(f".{folder.name}.new")  # one left by a kill is written over: the lock is ours
    (new / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_atomic(new / "program.toml", program_text.encode())
    write_record(new / "records.json", {})
    write_record(new / "manifest.json", Manifest(program.seed, dict(_inputs(program)), (_start(),)))
    return new


def _continued(program: Program, program_text: str, folder: Path, lock: locks.Lock) -> Run:
    manifest, start = _read_manifest(folder), _start()
    changed_input = _changed_input(manifest, dict(_inputs(program)))
    if changed_input is not None:
        raise InputError(
            f"runs: {changed_input} is not what it was when {folder} began, expected the same "
            "file; "
            "restore it, or set resume = false"
        )
    last = manifest.starts[-1].versions
    changed = [f"{name} {last.get(name)} -> {version}" for name, version in start.versions.items() if last.get(name) != version]
    notes = (f"{folder} is unfinished: continuing it",)
    if changed:
        notes += (f"versions changed since it was stopped ({', '.join(changed)}): it may not continue bit for bit",)
    records = read_records(folder / "records.json")
    write_record(folder / "manifest.json", msgspec.structs.replace(manifest, starts=(*manifest.starts, start)))
    write_atomic(folder / "program.toml", program_text.encode())
    return Run(folder, True, records, notes, lock)


def _finished(folder: Path, lock: locks.Lock) -> Run:
    summary = read_summary(folder / "summary.json")
    note = f"{folder} is finished: nothing is left to run; resume = false begins afresh"
    return Run(folder, True, {}, (note,), lock, summary)


def _change_since_end(program: Program, folder: Path) -> str | None:
    """Reason why a finished run does not stand for this program any more, in words; None if it
    does."""
    changed = _changed_input(_read_manifest(folder), dict(_inputs(program)))
    if changed is not None:
        return f"is finished, and {changed} is not what it was when it began"
    results = [paths.locate(stage.result.path, folder) for stage in program.stage if stage.result]
    gone = next((path for path in results if not path.exists()), None)
    return None if gone is None else f"is finished, but its result {gone} is gone"


def _changed_input(manifest: Manifest, inputs: Mapping[str, Record]) -> str | None:
    """Name of the first input that is not what the manifest says; None if all are. A copy's time
    may differ."""
    for name in {**inputs, **manifest.inputs}:
        before, now = (tree.get(name, {}) | {"time": None} for tree in (manifest.inputs, inputs))
        if before != now:
            return name
    return None


def _inputs(program: Program) -> Iterator[tuple[str, Record]]:
    """Every file that the program reads, by the path that it writes: SHA-256 and size, or size and time for large weights."""
    for name, file, is_hashed in save_paths.input_files(program):
        yield name, hashed_record(file) if is_hashed else file_record(file)


def _start() -> Start:
    versions = {"minitune": __version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    return Start(iso_time(datetime.now(UTC).timestamp()), socket.gethostname(), os.getpid(), versions)


def _lock(path: Path, folder: Path) -> tuple[locks.Lock, tuple[str, ...]]:
    """(lock of a run folder, notes for the user); InputError if another process trains in it."""
    try:
        return locks.acquire(path), ()
    except locks.Busy as busy:
        raise InputError(
            f"runs: {folder} is in use by {busy.holder}, expected one trainer a folder; wait, or change name"
        ) from None
    except locks.Unsupported as reason:
        note = f"{path} can't be locked ({reason}): start no second run of this name now"
        return locks.Lock(None, locks.holder_file(path)), (note,)
    except OSError as error:
        found = f"can't be locked ({error})"
        raise InputError(f"runs: {path} {found}, expected a file; change out") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"runs: {path} can't be read ({error}), expected a run folder's file; set resume = false") from None


def _read_manifest(folder: Path) -> Manifest:
    return read_json(folder / "manifest.json", Manifest, "runs", REMEDY)


def write_record(path: Path, tree: Mapping[str, Any] | Manifest) -> None:
    """Write a record as indented JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
