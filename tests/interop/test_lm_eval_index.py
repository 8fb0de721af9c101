"""An index of the folders that tasks need says of them what the index of all of the harness says."""

from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from minitune.interop.lm_eval_index import index_with, with_members

FILES = {
    "one/one.yaml": 'task: one\ntag: [shared, alone]\ndataset_path: "a"',
    "one/two.yaml": '"task": "two"  # quoted\n"tag": "shared"\n"dataset_path": "b"',
    "one-more/three.yaml": "include: template\ntask: three (of 3)\ndataset_path: c",
    "one-more/template": "tag:\n  - shared\n",
    "twice/one.yaml": "task: one\ndataset_path: second",
    "groups/all.yaml": "group: all\ntask:\n  - some\n  - task: four\n    num_fewshot: 2\n  - {group: inline, task: [one, five]}",
    "groups2/some.yaml": "group: some\ntask:\n  - shared",
    "four/four.yaml": "task: four\ndataset_path: d",
    "five/five.yaml": "task: five\ndataset_path: e",
    "six/six.yaml": "task: six\ndataset_path: f\ndescription: a task of no group",
}
ASKED = {
    "a task": (["four"], {"four"}),
    "a name with blanks": (["three (of 3)"], {"one-more"}),
    "a task that two folders have": (["one"], {"one", "one-more", "twice"}),
    "a tag of three folders": (["shared"], {"one", "one-more", "groups2"}),
    "a group of groups": (["all"], {"groups", "groups2", "one", "one-more", "twice", "four", "five"}),
    "two": (["six", "four"], {"six", "four"}),
}


def facts(index: dict[str, Any], names: set[str]) -> dict[str, tuple[Any, ...]]:
    return {name: (index[name].kind, index[name].yaml_path, index[name].cfg, index[name].tags) for name in names}


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tasks"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(root / "__init__.py"))
    return root


@pytest.mark.parametrize("name", ASKED)
def test_the_folders_of_a_task_say_of_it_what_all_do(name: str, harness: Path) -> None:
    tasks, folders = ASKED[name]
    index, whole = index_with(tasks, None), TaskIndex.build([harness])
    members = set(with_members(tasks, index))
    assert members == set(with_members(tasks, TaskIndexed(whole)))
    assert facts(index.task_index, members) == facts(whole, members)
    read = {entry.yaml_path.relative_to(harness).parts[0] for entry in index.task_index.values() if entry.yaml_path}
    assert read <= folders


def test_a_group_of_ones_own_may_hold_tasks_of_the_harness(harness: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("group: mine\ntask: [four, own]", encoding="utf-8")
    (tmp_path / "own" / "own.yaml").write_text("task: own\ntag: shared", encoding="utf-8")
    index = index_with(["mine", "shared"], tmp_path / "own")
    assert set(index.task_index) == {"mine", "own", "four", "shared"}
    assert index.task_index["shared"].tags == {"own"}  # one's own tag is one's own


def test_a_name_that_is_nowhere_is_looked_for_everywhere(harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def manager(include_path: Any = None, include_defaults: bool = True) -> TaskManager:
        asked.append(include_defaults)
        return TaskManager(None, include_path, False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    index_with(["four", "nowhere"], None)
    assert asked == [False, False, True]


class TaskIndexed:
    """An index in the place of a TaskManager."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.task_index = entries
