"""One run of a program: its folder, its manifest, its lock, whether it is resumed, and the fold over its stages."""

import os
import platform
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from time import perf_counter
from types import FrameType, TracebackType
from typing import Annotated, Any, NamedTuple

import msgspec

import minitune
from minitune import heap, log, paths, places, toml
from minitune.io import atomic, locks
from minitune.io.results import Record, file_record, hashed_record, iso_time
from minitune.program import Program, resolved
from minitune.report import report
from minitune.types import InputError
from minitune.world import Stopped, check, open_world

PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "msgspec", "wandb")
NOT_THE_RUN = ("log", "resume", "out")  # keys of a program that may change while a run goes on


class Start(msgspec.Struct, frozen=True):
    """When, where and with what a run was begun or continued."""

    time: str
    host: str
    pid: int
    versions: dict[str, str]


class Manifest(msgspec.Struct, frozen=True):
    """What a run was made of; inputs: by path, "sha256" and "bytes", or "bytes" and "time" for large weights."""

    seed: int
    inputs: dict[str, Record]
    starts: Annotated[tuple[Start, ...], msgspec.Meta(min_length=1)]


class Run(NamedTuple):
    """An opened run folder: nobody else trains in it until the lock file is closed."""

    folder: Path
    resumed: bool
    records: dict[str, Record]  # of the stages that were finished before
    notes: tuple[str, ...]  # what the user should be told
    lock: locks.Lock


class StopSignals:
    """Catches SIGTERM, SIGINT and Windows' SIGBREAK while it is entered; called, it says whether one has come.

    A second SIGINT acts as usual.
    """

    def __init__(self) -> None:
        """Outside of the main thread it catches nothing."""
        self.number: int | None = None  # of the last signal caught
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # SIGBREAK exists on Windows only, where it is what one process can send to another.
            names = ("SIGTERM", "SIGINT", "SIGBREAK")
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._caught) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        # Not through the console: a signal may come while it is printing, and its locks are held.
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())


def run_program(program: Program, stop: StopSignals | None = None) -> Record:
    """Run or continue a program and return what its summary.json holds.

    Raises InputError for what the user must change, and world.Stopped after a signal, when the state has been saved.
    """
    heap.keep_freed()
    check(program.model, program.data, program.stage)  # before a folder is made or a weight is read
    places.check(program)
    run = open_run(program, program_text=resolved(program))
    as_dict = msgspec.to_builtins(program)
    with run.lock, stop or StopSignals() as stopping, log.Log(run.folder, program.log, as_dict) as out:
        for note in run.notes:
            out.say(note)
        world = open_world(program.model, program.data, program.seed, run.folder, out, stopping, run.records, program.tf32)
        for stage in program.stage:
            if stopping():
                raise Stopped(summary(world.records).get("steps", 0), run.folder)
            out.begin(stage.label)
            started = perf_counter()
            world = stage.run(world)
            if stage.label in world.records:
                world = world.record(stage.label, {"time_s": perf_counter() - started, **world.records[stage.label]})
            _write_json(run.folder / "records.json", world.records)
        result = summary(world.records)
        _write_json(run.folder / "summary.json", result)
        out.show(report(program.name, result))
        out.say(f"{run.folder} holds this run: summary.json, metrics.jsonl, checkpoints, and the program that made them")
    return result


def summary(records: Mapping[str, Record]) -> Record:
    """The records by stage name, with what stands under their key "top" moved to the top level."""
    top = {key: value for record in records.values() for key, value in record.get("top", {}).items()}
    return {name: {key: value for key, value in record.items() if key != "top"} for name, record in records.items()} | top


def open_run(program: Program, *, program_text: str) -> Run:
    """Lock out/name and make it this program's folder: continue it, or move what is there aside and begin afresh.

    Nothing is ever deleted. InputError when another trainer holds the folder, when it is no run folder, when its inputs
    changed since it began, and when resume = true finds nothing to continue.
    """
    out = Path(program.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    folder = out / program.name
    lock = _lock(out / f".{program.name}.lock", folder)  # beside the folder: the folder may be moved aside
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
        atomic.sync(out)
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


def _difference(before: Any, now: Any, path: toml.KeyPath) -> str | None:
    if type(before) is not type(now) or not isinstance(now, (dict, list)):
        return None if before == now else f"holds another program ({toml.shown(path)} is {before!r} there and {now!r} here)"
    if isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    for key in before | now:
        if key not in before or key not in now:
            return f"holds another program ({toml.shown((*path, key))} stands only {'here' if key in now else 'there'})"
        if found := _difference(before[key], now[key], (*path, key)):
            return found
    return None


def _prepared(program: Program, program_text: str, folder: Path) -> Path:
    """A fresh run folder under another name, so that under its own it exists whole or not at all."""
    new = folder.with_name(f".{folder.name}.new")  # one left by a kill is written over: the lock is ours
    (new / "checkpoints").mkdir(parents=True, exist_ok=True)
    atomic.write_atomic(new / "program.toml", program_text.encode())
    _write_json(new / "records.json", {})
    _write_json(new / "manifest.json", Manifest(program.seed, dict(_inputs(program)), (_start(),)))
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
    _write_json(folder / "manifest.json", msgspec.structs.replace(manifest, starts=(*manifest.starts, start)))
    atomic.write_atomic(folder / "program.toml", program_text.encode())
    return Run(folder, True, records, notes, lock)


def _inputs(program: Program) -> Iterator[tuple[str, Record]]:
    """Every file that the program reads, by the path that it writes: SHA-256 and size, or size and time for large weights."""
    data = places.data_inputs(program)
    for key, written in (places.model_inputs(program) | data).items():
        path = paths.locate(written)
        if not path.exists():
            raise InputError(f"runs: {key} {written!r} does not exist (looked for {path.absolute()}), expected a file or folder")
        for file in sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]:
            name = f"{written}/{file.name}" if path.is_dir() else written
            yield name, hashed_record(file) if key in data else file_record(file)


def _start() -> Start:
    versions = {"minitune": minitune.__version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    return Start(iso_time(datetime.now(UTC).timestamp()), socket.gethostname(), os.getpid(), versions)


def _lock(path: Path, folder: Path) -> locks.Lock:
    """The lock of a run folder; InputError if another process trains in it, or the file system has no locks."""
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
    try:
        return msgspec.json.decode(_read(path), type=kind)
    except msgspec.DecodeError as error:
        raise InputError(
            f"runs: {path} is damaged ({error}), expected what a run writes; set resume = false to begin afresh"
        ) from None


def _write_json(path: Path, tree: Mapping[str, Any] | Manifest) -> None:
    atomic.write_atomic(path, msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
