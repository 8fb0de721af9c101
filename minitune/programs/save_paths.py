"""Paths that a program reads and writes, and the check that it never writes over what it reads."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from minitune.data.files import data_files
from minitune.errors import InputError
from minitune.io.locks import holder_file
from minitune.io.paths import locate, user_path
from minitune.io.results import Result, require_replaceable
from minitune.programs.data_paths import HUB, data_places, name_in_data_set
from minitune.programs.loading import ModelSource
from minitune.programs.program import Program
from minitune.programs.state import WritingStage
from minitune.programs.state_deltas import deltas_folder
from minitune.trackers.tracker import TRACKER_FILES

MODEL_PATHS = ("path", "config", "tokenizer", "deltas")
RUN_PARTS = (
    "checkpoints",
    "data.json",
    "ended.json",
    "log.txt",
    "manifest.json",
    "metrics.jsonl",
    "program.toml",
    "records.json",
    "report.html",
    "summary.json",
    "tensorboard",
    "wandb",
    *TRACKER_FILES,
)


def model_inputs(program: Program) -> dict[str, str]:
    """Every model folder and config that a program reads, by its key: {"model.path": ...,
    "train.teacher.path": ...}.
    """
    sources = {"model": program.model}
    for stage in program.stage:
        parts = {
            f"{stage.label}.{field}": getattr(stage, field) for field in stage.__struct_fields__
        }
        sources |= {key: part for key, part in parts.items() if isinstance(part, ModelSource)}
    inputs = {
        f"{at}.{key}": getattr(source, key) for at, source in sources.items() for key in MODEL_PATHS
    }
    return {
        key: path
        for key, path in inputs.items()
        if path is not None and not path.startswith("run/")
    }


def data_inputs(program: Program) -> dict[str, str]:
    """Every path to data of a program, by its key: {"data.train.path": ...,
    "data.train.mix[0].path": ...}.
    """
    inputs: dict[str, str] = {}
    for name, source in program.data.items():
        inputs |= source.paths_by_key(name)
    return inputs


def task_inputs(program: Program) -> dict[str, str]:
    """Every folder of the harness's task files that a program reads, by its key."""
    folders = {f"{stage.label}.include": getattr(stage, "include", None) for stage in program.stage}
    return {key: path for key, path in folders.items() if path is not None}


def input_files(program: Program) -> Iterator[tuple[str, Path, bool]]:
    """Every file that a program reads: (path in the program, file, whether it is data or a task).

    A folder and a pattern mean all of their files. InputError for a path where nothing is.
    """
    data, tasks = data_inputs(program), task_inputs(program)
    for key, written in (model_inputs(program) | data | tasks).items():
        if key in data and written.startswith(HUB):
            for file in data_places(written):
                yield f"{written}/{name_in_data_set(file)}", file, True
            continue
        path = locate(written)
        if key.endswith(".deltas"):
            path = deltas_folder(path)  # a run's other files change while it goes on
        if key in data:
            files = data_files(path)
        elif path.is_dir():
            files = sorted(path.rglob("*") if key in tasks else path.iterdir())
        else:
            files = [path]
        if files == [path] and not path.exists():
            looked_for = f"looked for {path.absolute()}"
            raise InputError(
                f"runs: {key} {written!r} does not exist ({looked_for}), expected a file or folder"
            )
        for file in files:
            if file.is_file():
                yield _name_of(file, path, written), file, key in data or key in tasks


def _name_of(file: Path, path: Path, written: str) -> str:
    """Name of an input file, which a copy of the folder has too where the path is relative."""
    if file == path:
        return written
    return f"{written}/{file.relative_to(path).as_posix()}" if path.is_dir() else str(file)


def check(program: Program) -> None:
    """InputError if a stage would write over, into or around what the program reads, its own run
    folder, the working folder, what another stage writes, or anything else that no save wrote; or
    write where nothing can be written.
    """
    _require_writable(f"out {program.out!r}", user_path(program.out))
    run = user_path(program.out) / program.name
    inputs = {**model_inputs(program), **task_inputs(program)}
    read = {key: locate(path) for key, path in inputs.items()}
    for key, path in data_inputs(program).items():
        if path.startswith(HUB):
            continue  # in the cache, which no stage writes
        place = locate(path)
        # A pattern is no place: the files that it matches are.
        files = [place] if place.is_dir() else data_files(place)
        read |= {key if len(files) == 1 else f"{key} ({file})": file for file in files}
    written: dict[str, tuple[Result, Path]] = {}
    for stage in program.stage:
        if not isinstance(stage, WritingStage):
            continue
        key, path = f"{stage.label} path {stage.result.path!r}", locate(stage.result.path, run)
        _check_apart(key, path, {**read, **{other: place for other, (_, place) in written.items()}})
        _check_run(key, path, run)
        _require_writable(key, path.parent)
        written[key] = (stage.result, path)
    for result, path in written.values():
        # What lies in the run folder now is moved aside before this run begins, or is this run's
        # own.
        if not _within(path, run):
            require_replaceable(path, result.kind)


def _check_apart(key: str, path: Path, others: Mapping[str, Path]) -> None:
    for other, place in others.items():
        relation = _relation(path, place)
        if relation is not None:
            raise _refused(key, f"{relation} {other} ({place})")


def _check_run(key: str, path: Path, run: Path) -> None:
    lock = run.with_name(f".{run.name}.lock")
    places = [
        (Path.cwd(), "the working folder"),
        (run, "the run folder"),
        (lock, "the run's lock"),
        (holder_file(lock), "the run's lock"),
        (run.with_name(f".{run.name}.new"), "the run folder"),
    ]
    for place, name in places:
        if _within(place, path):
            raise _refused(key, f"is or holds {name} ({place})")
    part = next(_below(path, run), None)
    if part is not None and part.casefold() in RUN_PARTS:
        raise _refused(key, f"is or lies in {part} of the run folder")


def _require_writable(key: str, folder: Path) -> None:
    """InputError unless a folder is there that can be written, or can be made."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        fault = f"lies in {nearest}, which is no folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        fault = f"lies in {nearest}, which can't be written"
    else:
        return
    raise InputError(f"places: {key} {fault}, expected a folder of yours; change the path")


def _refused(key: str, fault: str) -> InputError:
    return InputError(
        f"places: {key} {fault}, expected a place of its own; choose another path, such as run/NAME"
    )


def _relation(path: Path, place: Path) -> str | None:
    """Relation of a path to be written to another one, in words; None if they are apart."""
    if _same(path, place):
        return "is also"
    if _within(place, path):
        return "holds"
    return "lies inside" if _within(path, place) else None


def _below(path: Path, folder: Path) -> Iterator[str]:
    """Names that lead from a folder down to a path inside it; none for a path outside."""
    path = Path(os.path.realpath(path))
    names: list[str] = []
    for place in (path, *path.parents):
        if _same(place, folder):
            yield from reversed(names)
            return
        names.append(place.name)


def _within(inner: Path, outer: Path) -> bool:
    inner = Path(os.path.realpath(inner))
    return any(_same(place, outer) for place in (inner, *inner.parents))


def _same(a: Path, b: Path) -> bool:
    """True if two paths are one place, through symbolic links and whatever the case of their
    letters means here.
    """
    if a.exists() and b.exists():
        return a.samefile(b)
    return os.path.normcase(os.path.realpath(a)) == os.path.normcase(os.path.realpath(b))
