"""Data of the harness's tasks: files of one's own, which may lie beside the task's file."""

from glob import iglob
from pathlib import Path
from typing import Any

TASK_FILE = "task_file"  # key in a task's metadata, where lm_eval is given no path of its file
# dataset_path of a task on one's own files
LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")


def find_data_beside(index: Any, include: Path | None) -> None:
    """Give the tasks of a folder, as an index has them, the whole paths of data beside them."""
    for entry in index.task_index.values():
        if include is not None and entry.yaml_path and entry.yaml_path.is_relative_to(include):
            _find_data_beside(entry)


def _find_data_beside(entry: Any) -> None:
    """Give a task the whole paths of data files that its own file names from where it lies.

    lm_eval looks for them from the current folder alone, so that a folder of tasks could not be
    moved with its data.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    kwargs = (entry.cfg or {}).get("dataset_kwargs")
    if not is_local(entry.cfg or {}) or not isinstance(kwargs, dict):
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


def task_file(entry: Any) -> Path | str | None:
    """Path of the file that a task stands in."""
    return entry.yaml_path or ((entry.cfg or {}).get("metadata") or {}).get(TASK_FILE)


def is_local(task: dict[str, Any]) -> bool:
    """Return True if a task's data are files on this machine."""
    has_address = "://" in str(task.get("dataset_kwargs"))
    return task.get("dataset_path") in LOCAL_FORMATS and not has_address
