"""Tasks of the lm-evaluation-harness: which there are, and what is wrong with a task's file."""

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from glob import iglob
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from minitune.errors import InputError, nearest
from minitune.interop.lm_eval_results import is_ours

ENVIRONMENT = {
    "DISABLE_MULTIPROC": "1",  # resampling forks no copy of a process that holds a model
    # lm_eval returns nothing on other ranks, and here every rank has all results
    "LOCAL_RANK": "0",
}
# What a task file calls its task, group or tags.
DECLARED = re.compile(rb"""^\s*(?:task|group|tag|-)\s*:?[ \t]+['"]?([\w.+-]+)['"]?[ \t]*$""", re.M)
TASK_FILE = "task_file"  # key in a task's metadata, where lm_eval is given no path of its file
# dataset_path of a task on one's own files
LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")


def check(include: Path | None, tasks: Sequence[str] | None = None) -> None:
    """InputError where lm_eval is not installed, for a folder without task files, for a task that
    there is not, and for a task on local files that lm_eval can't make a request of.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        missing = "lm_eval: lm_eval is not installed, this needs the extra eval"
        raise InputError(f"{missing}: pip install 'minitune[eval]'") from None
    if include is not None and next(include.rglob("*.yaml"), None) is None:
        found = f"lm_eval: {include} holds no task"
        raise InputError(f"{found}, expected a folder with *.yaml files; see docs/eval.md")
    if tasks is None:
        return
    with quiet() as errors:
        own = _opened_index(include)
        rest = [name for name in tasks if name not in own.all_tasks]
        # To list the harness's own tasks takes seconds: most names are found in its files.
        if not tasks or not set(rest) <= _declared_names():
            index_of(tasks, include)
        for name in tasks:
            entry = own.task_index.get(name)
            if entry is None or not _is_local(entry.cfg or {}):
                continue
            with refusals([name], own, errors):
                for task in own.load([name])["tasks"].values():
                    task.build_all_requests(limit=1, rank=0, world_size=1)


def index_of(tasks: Sequence[str], include: Path | None) -> Any:
    """TaskManager of lm_eval that knows the tasks; InputError for a task that there is not."""
    from lm_eval import __version__

    index = _opened_index(include)
    if not set(tasks) <= set(index.all_tasks):  # it takes seconds to list the harness's own
        index = _opened_index(include, include_defaults=True)
    unknown = [name for name in tasks if name not in index.all_tasks]
    if unknown or not tasks:
        where = f"names of tasks under {include} or of lm_eval {__version__}"
        meant = ""
        if unknown:
            meant = f"{unknown[0]} is in neither{nearest(unknown[0], index.all_tasks)}"
        found = f"lm_eval: tasks are {list(tasks)}, expected {where}"
        raise InputError(f"{found}; {meant or 'name at least one'}")
    return index


@contextlib.contextmanager
def refusals(tasks: Sequence[str], index: Any, errors: BufferingHandler) -> Iterator[None]:
    """Turn what lm_eval raises over a task's file or its data into an InputError that names it.

    errors: what it logged. Errors of the model stay as they are.
    """
    from lm_eval import __version__

    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"lm_eval: the data of {', '.join(tasks)} can't be read ({error}), expected local "
            "files or data sets in the cache; run once with the network, or correct data_files"
        ) from None
    except Exception as error:
        if is_ours(error):
            raise
        files = [_task_file(index.task_index[name]) for name in tasks]
        where = ", ".join(str(path or name) for path, name in zip(files, tasks, strict=True))
        logged = [record.getMessage() for record in errors.buffer[-1:]]
        words = [*logged, f"{type(error).__name__}: {error}"]
        said = " ".join("; ".join(words).split())[:500]
        raise InputError(
            f"lm_eval: {where}: {said}; expected a task that lm_eval {__version__} can run on "
            "its data; correct the task's file or its data"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[BufferingHandler]:
    """Buffer of lm_eval's errors; inside, neither it nor datasets shows bars, lines or counts."""
    from datasets import config

    logger, errors = logging.getLogger("lm_eval"), BufferingHandler(100)
    level, counts = logger.level, config.HF_UPDATE_DOWNLOAD_COUNTS
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else datasets reports every local file that it opens
    logger.setLevel(logging.ERROR)
    logger.addHandler(errors)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield errors
    finally:
        logger.removeHandler(errors)
        logger.setLevel(level)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ.update({name: value})


def _opened_index(include: Path | None, include_defaults: bool = False) -> Any:
    """TaskManager of the tasks in a folder, whose data may lie beside their files."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=include, include_defaults=include_defaults)
    for entry in index.task_index.values():
        if include is not None and entry.yaml_path and entry.yaml_path.is_relative_to(include):
            _find_data_beside(entry)
    return index


def _find_data_beside(entry: Any) -> None:
    """Give a task the whole paths of data files that its own file names from where it lies.

    lm_eval looks for them from the current folder alone, so that a folder of tasks could not be
    moved with its data.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    kwargs = (entry.cfg or {}).get("dataset_kwargs")
    if not _is_local(entry.cfg or {}) or not isinstance(kwargs, dict):
        return
    files = kwargs.get("data_files")
    found = _beside(files, entry.yaml_path.parent)
    if found == files:
        return
    try:
        task = load_yaml(entry.yaml_path)  # lm_eval would read the file anew, with its own paths
    except Exception:
        return  # lm_eval says what is wrong when it loads the task
    metadata = task.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), TASK_FILE: str(entry.yaml_path)}
    with_paths = {**kwargs, "data_files": found}
    entry.cfg = {**task, "dataset_kwargs": with_paths, "metadata": metadata}
    entry.yaml_path = None


def _beside(files: Any, folder: Path) -> Any:
    """Data files of a task (a path, or a list or table of them), those in the folder whole."""
    if isinstance(files, dict):
        return {split: _beside(path, folder) for split, path in files.items()}
    if isinstance(files, list):
        return [_beside(path, folder) for path in files]
    if not isinstance(files, str) or Path(files).is_absolute():
        return files
    is_there = next(iglob(files, root_dir=folder, recursive=True), None) is not None
    return str(folder / files) if is_there else files


def _task_file(entry: Any) -> Path | str | None:
    """Path of the file that a task stands in."""
    return entry.yaml_path or ((entry.cfg or {}).get("metadata") or {}).get(TASK_FILE)


def _declared_names() -> set[str]:
    """Names that the harness's own task files declare, and a few words more."""
    import lm_eval.tasks

    names: set[str] = set()
    for file in Path(str(lm_eval.tasks.__file__)).parent.rglob("*.yaml"):
        names.update(name.decode() for name in DECLARED.findall(file.read_bytes()))
    return names


def _is_local(task: dict[str, Any]) -> bool:
    """Return True if a task's data are files on this machine."""
    has_address = "://" in str(task.get("dataset_kwargs"))
    return task.get("dataset_path") in LOCAL_FORMATS and not has_address
