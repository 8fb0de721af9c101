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
from minitune.io.atomic import sync, write_atomic
from minitune.io.json_file import read_json
from minitune.io.results import Record, file_record, hashed_record, iso_time
from minitune.io.toml_messages import KeyPath, shown
from minitune.programs import save_paths
from minitune.programs.program import Program

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


def open_run(program: Program, *, program_text: str) -> Run:
    """Lock out/name and make it this program's folder: continue it, or move what is there aside and begin afresh.

    Nothing is ever deleted. InputError when another trainer holds the folder, when it is no run folder, when its inputs
    changed since it began, and when resume = true finds nothing to continue.
    """
    out = paths.user_path(program.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = out / program.name
    lock = _lock(out / f".{program.name}.lock", folder)  # not inside the folder, which may be moved aside
    try:
        exists = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if exists and not (folder / "manifest.json").is_file():
            raise InputError(f"runs: {folder} holds no manifest.json, expected a run folder; change name or out, or move it away")
        obstacle = _obstacle(folder, program_text, program.resume) if exists else "does not exist"
        if obstacle is None:
            return _continued(program, program_text, folder, lock)
        if program.resume:
            raise InputError(f"runs: {folder} {obstacle}, expected an unfinished run to resume; drop resume = true")
        new = _prepared(program, program_text, folder)
        notes = ()
        if exists:
            aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
            folder.rename(aside)
            notes = (f"{folder} {obstacle}: moved to {aside}",)
        new.rename(folder)
        sync(out)
    except BaseException:
        lock.close()
        raise
    return Run(folder, False, {}, notes, lock)


def _obstacle(folder: Path, program_text: str, resume: bool | None) -> str | None:
    """Why a run folder is not to be continued by this program, in words; None if it is."""
    if (folder / "summary.json").exists():
        return "is finished"
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
    manifest = _json(folder / "manifest.json", Manifest)
    inputs, start = dict(_inputs(program)), _start()
    for name in inputs | manifest.inputs:
        before, now = (tree.get(name, {}) | {"time": None} for tree in (manifest.inputs, inputs))  # a copy has another time
        if before != now:
            raise InputError(
                f"runs: {name} is not what it was when {folder} began, expected the same file; restore it, or set resume = false"
            )
    last = manifest.starts[-1].versions
    changed = [f"{name} {last.get(name)} -> {version}" for name, version in start.versions.items() if last.get(name) != version]
    notes = (f"{folder} is unfinished: continuing it",)
    if changed:
        notes += (f"versions changed since it was stopped ({', '.join(changed)}): it may not continue bit for bit",)
    records = _json(folder / "records.json", dict[str, Record])
    write_record(folder / "manifest.json", msgspec.structs.replace(manifest, starts=(*manifest.starts, start)))
    write_atomic(folder / "program.toml", program_text.encode())
    return Run(folder, True, records, notes, lock)


def _inputs(program: Program) -> Iterator[tuple[str, Record]]:
    """Every file that the program reads, by the path that it writes: SHA-256 and size, or size and time for large weights."""
    data = save_paths.data_inputs(program)
    for key, written in (save_paths.model_inputs(program) | data).items():
        path = paths.locate(written)
        if not path.exists():
            raise InputError(f"runs: {key} {written!r} does not exist (looked for {path.absolute()}), expected a file or folder")
        for file in sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]:
            name = f"{written}/{file.name}" if path.is_dir() else written
            yield name, hashed_record(file) if key in data else file_record(file)


def _start() -> Start:
    versions = {"minitune": __version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    return Start(iso_time(datetime.now(UTC).timestamp()), socket.gethostname(), os.getpid(), versions)


def _lock(path: Path, folder: Path) -> locks.Lock:
    """Lock of a run folder; InputError if another process trains in it, or the file system has no locks."""
    try:
        return locks.acquire(path)
    except locks.Busy as busy:
        raise InputError(
            f"runs: {folder} is in use by {busy.holder}, expected one trainer a folder; wait, or change name"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise InputError(f"runs: {path} can't be locked ({error}), expected a file system with locks; change out") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"runs: {path} can't be read ({error}), expected a run folder's file; set resume = false") from None


def _json(path: Path, kind: Any) -> Any:
    return read_json(path, kind, "runs", "set resume = false to begin afresh")


def write_record(path: Path, tree: Mapping[str, Any] | Manifest) -> None:
    """Write a record as indented JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
