"""States that are written while steps are taken: the same ones, in another thread, and none is lost by what goes wrong."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import checkpoint, tree
from minitune.checkpoint import state_writer as module
from minitune.checkpoint.state_writer import state_writer
from minitune.errors import DiskFullError
from minitune.io import atomic
from minitune.programs.signals import Stopped
from minitune.programs.stages.training_stage import Evaluation
from minitune.sharding.ranks import ALONE
from support.numbers import STAGE, Numbers, train

BACKGROUND = msgspec.structs.replace(STAGE, save_in_background=True, keep=9)
LONG_S = 120  # after which a thread that nobody lets go on fails its test
LIKE = {"trainable": {"x": torch.tensor(0.0)}}


class Donating(Numbers):
    """Task that writes over the number that it is given, as donated steps do."""

    def __init__(self, at_step: Callable[[int], object] = lambda step: None) -> None:
        super().__init__()
        self.at_step = at_step

    def step(self, train_state: Any, batch: torch.Tensor) -> Any:
        self.at_step(int(batch) + 1)
        after, metrics = super().step(train_state, batch)
        return tree.donate(train_state, after), metrics


def values(folder: Path) -> dict[str, float]:
    """The trained number in each saved state."""
    states = checkpoint.list_states(folder / "checkpoints/train")
    return {path.name: float(checkpoint.load_state(path, LIKE)[0]["trainable"]["x"]) for path in states}


@pytest.mark.parametrize("save_every", [1, 2, 4])
def test_steps_go_on_while_a_slow_disk_is_written_to_by_another_thread(
    save_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, syncing, waited = threading.Event(), set[int](), list[int]()
    fsync, save_parts = os.fsync, module.save_parts

    def slow(*args: Any) -> Path:
        assert go_on.wait(LONG_S)
        return save_parts(*args)

    def synced(handle: int) -> None:
        syncing.add(threading.get_ident())
        fsync(handle)

    def at_step(step: int) -> None:
        # the disk goes on after as many steps as there are between two saves, and one save later than that nothing is written yet
        waited.append(0 if go_on.is_set() else step)
        if step == 2 * save_every:
            go_on.set()

    monkeypatch.setattr(module, "save_parts", slow)
    monkeypatch.setattr(os, "fsync", synced)
    stage = msgspec.structs.replace(BACKGROUND, save_every=save_every, steps=2 * save_every)
    x, loop = train(tmp_path, Donating(at_step), stage)
    assert (float(x), loop.step) == (2 * save_every, 2 * save_every)
    assert waited == list(range(1, 2 * save_every + 1))
    # of the copies that were made before the steps wrote over them
    assert values(tmp_path) == {f"step-{n:08d}": n for n in (save_every, 2 * save_every)}
    assert syncing
    assert threading.get_ident() not in syncing


def test_a_stage_leaves_the_same_files_whichever_thread_writes(tmp_path: Path) -> None:
    evaluated = msgspec.structs.replace(BACKGROUND, evaluate=Evaluation(data="heldout", every=2))
    train(tmp_path / "background", Numbers(skipped=(2,)), evaluated)
    train(tmp_path / "at-once", Numbers(skipped=(2,)), msgspec.structs.replace(evaluated, save_in_background=False))
    tensors = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "background", tmp_path / "at-once")
    ]
    assert tensors[0] == tensors[1]
    assert len(tensors[0]) == 5  # none of the step that changed nothing


def test_a_save_waits_for_the_one_before_it_and_takes_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, places, save_parts = list[int](), list[int](), list[Any](), module.save_parts

    def counted(folder: Path, step: int, parts: Any, *args: Any) -> Path:
        running.append(step)
        most.append(len(running))
        places.append([part.tensor.data_ptr() for part in parts.parts.values()])
        path = save_parts(folder, step, parts, *args)
        running.remove(step)
        return path

    monkeypatch.setattr(module, "save_parts", counted)
    state = {"w": torch.arange(35.0).view(7, 5).mT, "n": torch.tensor(3), "empty": torch.empty(0, 4)}
    with state_writer(ALONE, in_background=True) as writer:
        assert writer is not None
        for step in range(1, 6):
            writer.save(tmp_path, step, tree.map(lambda x, step=step: x + step, state), {"step": step}, None)
    assert most == [1] * 5
    assert len({tuple(one[:2]) for one in places}) == 1
    for step, path in enumerate(checkpoint.list_states(tmp_path), 1):
        loaded, _ = checkpoint.load_state(path, state)
        assert all(torch.equal(loaded[name], x + step) for name, x in state.items())


@pytest.mark.parametrize("ends", ["at a step", "at the end", "by a signal"])
def test_a_full_disk_is_told_in_the_sentence_of_every_save(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_steps = {"at a step": 50, "at the end": 3, "by a signal": 50}[ends]
    stage = msgspec.structs.replace(BACKGROUND, save_every=3, steps=n_steps)
    free, numbers = atomic.free_bytes, Donating()
    if ends == "by a signal":
        stage = msgspec.structs.replace(stage, evaluate=Evaluation(data="heldout", every=2))
        numbers.signal_at = 2
    else:
        monkeypatch.setattr(atomic, "free_bytes", lambda path: free(path) if "00000003" not in str(path) else 1)
    if ends == "by a signal":
        with pytest.raises(Stopped, match="stopped at step 2"):
            train(tmp_path, numbers, stage)
        assert values(tmp_path) == {"step-00000002": 2.0}
        monkeypatch.setattr(atomic, "free_bytes", lambda path: 1)
        numbers.signal_at = 4
    with pytest.raises(DiskFullError, match=r"step-0000000. needs 4 bytes for the training state, its disk has 1 free"):
        train(tmp_path, numbers, stage)
    assert not any(thread.name == "save" for thread in threading.enumerate())
    monkeypatch.undo()
    numbers.signal_at = 0
    x, _ = train(tmp_path, numbers, stage)
    assert float(x) == n_steps


class BrokenError(RuntimeError):
    """Whatever may go wrong in a step."""


def test_a_step_that_fails_does_not_lose_the_save_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing, save_parts = threading.Event(), module.save_parts

    def slow(*args: Any) -> Path:
        assert failing.wait(LONG_S)
        return save_parts(*args)

    def at_step(step: int) -> None:
        if step == 3:
            failing.set()
            raise BrokenError

    monkeypatch.setattr(module, "save_parts", slow)
    with pytest.raises(BrokenError):
        train(tmp_path, Donating(at_step), msgspec.structs.replace(BACKGROUND, save_every=2))
    assert values(tmp_path) == {"step-00000002": 2.0}
