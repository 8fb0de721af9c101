"""Tasks of the lm-evaluation-harness: which there are, and what is wrong with a task's file."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from minitune.errors import InputError, nearest
from minitune.interop.lm_eval_data import is_local, task_file
from minitune.interop.lm_eval_index import index_with, own_index
from minitune.interop.lm_eval_results import is_ours

ENVIRONMENT = {
    "DISABLE_MULTIPROC": "1",  # resampling forks no copy of a process that holds a model
    # lm_eval returns nothing on other ranks, and here every rank has all results
    "LOCAL_RANK": "0",
}
SURROUNDINGS = ("get_git_commit_hash", "add_env_info")  # functions of lm_eval.evaluator


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
        index_of(tasks, include)
        own = own_index(include)
        for name in tasks:
            entry = own.task_index.get(name)
            if entry is None or not is_local(entry.cfg or {}):
                continue
            with refusals([name], own, errors):
                for task in own.load([name])["tasks"].values():
                    task.build_all_requests(limit=1, rank=0, world_size=1)


def index_of(tasks: Sequence[str], include: Path | None) -> Any:
    """TaskManager of lm_eval that knows the tasks; InputError for a task that there is not."""
    from lm_eval import __version__

    index = index_with(tasks, include)
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
            f"files or data sets in the cache{_tried(tasks, index)}; run once with the network, "
            "or correct data_files"
        ) from None
    except Exception as error:
        if is_ours(error):
            raise
        files = [task_file(index.task_index[name]) for name in tasks]
        where = ", ".join(str(path or name) for path, name in zip(files, tasks, strict=True))
        logged = [record.getMessage() for record in errors.buffer[-1:]]
        words = [*logged, f"{type(error).__name__}: {error}"]
        said = " ".join("; ".join(words).split())[:500]
        raise InputError(
            f"lm_eval: {where}: {said}; expected a task that lm_eval {__version__} can run on "
            "its data; correct the task's file or its data"
        ) from None


def _tried(tasks: Sequence[str], index: Any) -> str:
    """Folders in which the local files of tasks were looked for, or nothing without such tasks."""
    entries = [index.task_index[name] for name in tasks]
    files = [task_file(entry) for entry in entries if is_local(entry.cfg or {})]
    folders = sorted({str(Path(file).parent) for file in files if file})
    places = f"beside the task in {', '.join(folders)}, then in {Path.cwd()}"
    return f" (local files: {places})" if folders else ""


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


@contextlib.contextmanager
def without_surroundings() -> Iterator[None]:
    """Context in which lm_eval adds nothing of the machine and of git to its results.

    It asks git, which complains outside of a repository, and other programs, for seconds.
    """
    from lm_eval import evaluator

    asked = {name: getattr(evaluator, name) for name in SURROUNDINGS}
    for name in asked:
        setattr(evaluator, name, lambda *results: None)
    try:
        yield
    finally:
        for name, function in asked.items():
            setattr(evaluator, name, function)
