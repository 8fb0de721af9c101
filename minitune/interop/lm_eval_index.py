"""Index of lm_eval's tasks, of the folders that hold those that are asked for.

The harness has thousands of task files, and reads all of them whenever it looks up a name.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OTHER_SUFFIXES = (".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".sh", ".jpg")
# What a task file calls its task, group or tags. It finds all names, and a few words more.
DECLARED = re.compile(
    rb"""^\s*(?:["']?(?:task|group|tag)["']?[ \t]*:|-)[ \t]*["']?([^\s"'#\[{][^"'#\n\r]*)""", re.M
)


def own_index(include: Path | None) -> Any:
    """TaskManager of lm_eval that knows the tasks of a folder alone; None: of no folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=False)


def index_with(tasks: Sequence[str], include: Path | None) -> Any:
    """TaskManager that knows these tasks, what their groups hold and what bears their tags.

    It knows all tasks of the harness where a name is in none of its files.
    """
    from lm_eval.tasks import TaskManager

    own = index = own_index(include)
    folders: set[Path] = set()
    declared: Mapping[str, set[Path]] = {}
    while True:
        names = [name for name in with_members(tasks, index) if name not in own.task_index]
        missing = [name for name in names if name not in index.task_index]
        # Any folder may have a task that bears a tag.
        tags = [name for name in names if name in index.task_index and _is_tag(name, index)]
        if not missing and not tags:
            return index
        declared = declared or _declared()
        more = {folder for name in (*missing, *tags) for folder in declared.get(name, ())} - folders
        if not more:
            return TaskManager(include_path=include) if missing else index
        folders |= more
        index = _index_of(folders, include, own)


def _index_of(folders: set[Path], include: Path | None, own: Any) -> Any:
    """TaskManager of some of the harness's folders and the user's own."""
    from lm_eval.tasks import TaskManager

    # Of two tasks of a name the harness takes the first, and of two paths the last one's.
    first_last = sorted(folders, key=lambda folder: f"{folder.as_posix()}/", reverse=True)
    paths = [*first_last, *([include] if include is not None else [])]
    index = TaskManager(include_path=[*paths], include_defaults=False)
    # A tag of several paths has the tasks of the last one alone.
    for tag in index.all_tags:
        if tag not in own.task_index:
            bearing = {name for name, entry in index.task_index.items() if tag in entry.tags}
            index.task_index[tag].tags = {name for name in bearing if not _is_tag(name, index)}
    return index


def _is_tag(name: str, index: Any) -> bool:
    return index.task_index[name].kind.name == "TAG"


def _declared() -> dict[str, set[Path]]:
    """Folders of the harness whose files declare each name."""
    import lm_eval.tasks

    root = Path(str(lm_eval.tasks.__file__)).parent
    folders: defaultdict[str, set[Path]] = defaultdict(set)
    for folder in root.iterdir():
        # What task files include is YAML too, whatever it is called.
        for file in folder.rglob("*"):
            if file.suffix not in OTHER_SUFFIXES and file.is_file():
                for name in DECLARED.findall(file.read_bytes()):
                    folders[name.decode(errors="replace").strip()].add(folder)
    return folders


def with_members(tasks: Sequence[str], index: Any) -> Iterator[str]:
    """Yield the names of tasks and of all that the groups among them hold, each once."""
    waiting, seen = list(tasks), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        yield name
        entry = index.task_index.get(name)
        if entry is not None and entry.kind.name == "GROUP":
            waiting += _members((entry.cfg or {}).get("task"), index)


def _members(listed: Any, index: Any) -> Iterator[str]:
    """Yield the names that a group's list holds; a group in it may be written there itself."""
    for item in listed if isinstance(listed, list) else []:
        named = item.get("group", item.get("task")) if isinstance(item, dict) else item
        is_written_here = isinstance(item, dict) and isinstance(item.get("task"), list)
        if is_written_here and named not in index.task_index:
            yield from _members(item["task"], index)
        elif isinstance(named, str):
            yield named
