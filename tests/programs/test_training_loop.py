"""The training loop over a model of one number: skipped steps, signals in an evaluation, and which states stay."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import checkpoint
from minitune.checkpoint import state_writer
from minitune.errors import InputError
from minitune.programs.log import Log, LogConfig
from minitune.programs.signals import Stopped
from minitune.programs.stages import loop_state, step_lines
from minitune.programs.stages.loop_state import MAX_SKIPPED
from minitune.programs.stages.training_stage import Evaluation
from support.numbers import STAGE, Numbers, Power, train


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_states(folder / "checkpoints/train")]


def rows(folder: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss", "skipped", "heldout_loss")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: row[key] for key in kept if key in row} for row in map(json.loads, lines)]


def test_a_run_of_skipped_steps_is_refused_as_often_as_it_is_started(tmp_path: Path) -> None:
    stage = msgspec.structs.replace(STAGE, steps=45)
    for _ in range(4):
        with pytest.raises(InputError, match=rf"train had {MAX_SKIPPED} steps in a row .*, and 20 in all; they changed nothing"):
            train(tmp_path, Numbers(skipped=tuple(range(1, 46))), stage)
    assert steps(tmp_path) == []


def test_the_last_state_that_learned_stays_while_steps_are_skipped(tmp_path: Path) -> None:
    stage = msgspec.structs.replace(STAGE, steps=60)
    for _ in range(3):
        with pytest.raises(InputError, match=r"up to step 31, .*step-00000011 is the newest state that was saved"):
            train(tmp_path, Numbers(skipped=tuple(range(12, 61))), stage)
        assert steps(tmp_path) == [10, 11]


def test_skips_are_counted_across_a_stop(tmp_path: Path) -> None:
    class Signalled(Numbers):
        def step(self, train_state: Any, batch: Any) -> Any:
            if int(batch) + 1 == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(train_state, batch)

    stage, skipped = msgspec.structs.replace(STAGE, steps=60), tuple(range(12, 61))
    with pytest.raises(Stopped, match="step 20"):
        train(tmp_path, Signalled(skipped), stage)
    assert steps(tmp_path) == [10, 11, 20]  # no state is dropped for one that is counted from skipped steps
    for _ in range(2):
        with pytest.raises(InputError, match=r"had 20 steps in a row .*, up to step 31"):
            train(tmp_path, Numbers(skipped), stage)
        assert steps(tmp_path) == [10, 11, 20]


@pytest.mark.parametrize("skipped", [(5, 6), (1, 2, 3, 4), (1, 3, 5, 6), (2, 3, 5, 6)])
def test_a_stage_that_ends_in_skipped_steps_is_no_success(skipped: tuple[int, ...], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=rf"up to step 6, and {len(skipped)} in all; they changed nothing"):
            train(tmp_path, Numbers(skipped))
    assert 6 not in steps(tmp_path)


def test_a_save_that_falls_on_a_skipped_step_is_made_up_for(tmp_path: Path) -> None:
    stage = msgspec.structs.replace(STAGE, steps=9, save_every=3)
    with pytest.raises(Power):
        train(tmp_path, Numbers(skipped=(3, 4), dies_at=6), stage)
    assert steps(tmp_path) == [5]
    x, loop = train(tmp_path, Numbers(skipped=(3, 4)), stage)
    assert (x, loop.step, loop.n_skipped, loop.n_skipped_in_a_row) == (7.0, 9, (2,), 0)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_states_stay_as_the_stage_keeps(keep: int, tmp_path: Path) -> None:
    train(tmp_path, Numbers(), msgspec.structs.replace(STAGE, keep=keep))
    assert steps(tmp_path) == list(range(7 - keep, 7))


def test_what_a_kill_left_behind_is_removed_at_the_next_start(tmp_path: Path) -> None:
    train(tmp_path, Numbers())
    folder = tmp_path / "checkpoints/train"
    for name in ("step-00000001", ".step-00000004.minitune-gone", ".step-00000007.minitune-new"):
        (folder / name).mkdir()
        (folder / name / "state.safetensors").write_bytes(b"half")
    (folder / "step-00000003.bak").mkdir()  # a user's copy
    (folder / "step-notes.txt").write_text("mine", encoding="utf-8")
    train(tmp_path, Numbers())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000003.bak", "step-00000005", "step-00000006", "step-notes.txt"]


def test_rows_are_on_the_disk_before_a_state_that_counts_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, save = Log.sync, state_writer.save_parts
    monkeypatch.setattr(Log, "sync", lambda self: (events.append("rows"), sync(self))[1])
    monkeypatch.setattr(state_writer, "save_parts", lambda *args: (events.append("state"), save(*args))[1])
    train(tmp_path, Numbers())
    assert events == ["rows", "state"] * 6


EVALUATED = msgspec.structs.replace(STAGE, evaluate=Evaluation(data="heldout", every=2))


@pytest.mark.parametrize("signal_at", [2, 4, 6])
def test_a_signal_in_an_evaluation_loses_nothing(signal_at: int, tmp_path: Path) -> None:
    stage = msgspec.structs.replace(EVALUATED, save_every=100)
    straight, stopped = Numbers(skipped=(4,)), Numbers(skipped=(4,), signal_at=signal_at - (signal_at >= 4))
    expected = train(tmp_path / "straight", straight, stage)
    with pytest.raises(Stopped, match=f"stopped at step {signal_at}"):
        train(tmp_path / "stopped", stopped, stage)
    assert steps(tmp_path / "stopped") == [signal_at]
    again = Numbers(skipped=(4,))
    x, loop = train(tmp_path / "stopped", again, stage)
    timeless = {"time_s": 0.0, "peak_mem_bytes": 0}
    assert x == expected[0]
    assert msgspec.structs.replace(loop, **timeless) == msgspec.structs.replace(expected[1], **timeless)
    assert stopped.evaluations + again.evaluations == straight.evaluations
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop": 7}, "Expected `object`, got `int`"),
        ({"loop": {"cursors": [[0, 1]]}}, "Object missing required field `nats`"),
        ({}, "Expected `object`, got `null`"),
        ({"loop": {**msgspec.to_builtins(loop_state.begin(2, 1))}}, "2 nats in place of 1"),
        ({"loop": {**msgspec.to_builtins(loop_state.begin(1, 3))}}, "3 cursors in place of 1"),
    ],
)
def test_counters_of_another_shape_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    start = {"trainable": {"x": torch.tensor(0.0)}}
    checkpoint.save_state(tmp_path / "checkpoints/train", 3, start, change)
    with pytest.raises(InputError, match=rf"state\.json is of another program \({message}.*; remove"):
        train(tmp_path, Numbers())


MEASURED = msgspec.structs.replace(STAGE, evaluate=Evaluation("heldout", every=2, at_start=True))
ONE = torch.tensor(1.0)


def test_the_first_evaluation_is_of_what_the_stage_begins_with(tmp_path: Path) -> None:
    numbers = Numbers()
    _, loop = train(tmp_path, numbers, MEASURED, ONE)
    assert numbers.evaluations == [1.0, 3.0, 5.0, 7.0]
    assert rows(tmp_path)[0] == {"step": 0, "heldout_loss": 1.0}
    assert [row["step"] for row in rows(tmp_path) if "heldout_loss" in row] == [0, 2, 4, 6]
    assert (loop.best_step, loop.best_nats) == ((6,), (1 / 7,))


@pytest.mark.parametrize("dies_at", [1, 4])
def test_the_first_evaluation_has_one_row_however_often_a_run_begins(dies_at: int, tmp_path: Path) -> None:
    train(tmp_path / "straight", Numbers(), MEASURED, ONE)
    stage = msgspec.structs.replace(MEASURED, save_every=2)
    for _ in range(2):
        with pytest.raises(Power):
            train(tmp_path / "died", Numbers(dies_at=dies_at), stage, ONE)
    train(tmp_path / "died", Numbers(), stage, ONE)
    assert rows(tmp_path / "died") == rows(tmp_path / "straight")


def test_a_signal_in_the_first_evaluation_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    train(tmp_path / "straight", Numbers(), MEASURED, ONE)
    with pytest.raises(Stopped, match="step 0"):
        train(tmp_path / "signalled", Numbers(signal_at=1), MEASURED, ONE)
    train(tmp_path / "signalled", Numbers(), MEASURED, ONE)
    assert rows(tmp_path / "signalled") == rows(tmp_path / "straight")


@pytest.mark.parametrize("min_delta", [0.0, 0.04, 0.1, 0.3])
def test_patience_counts_as_early_stopping_of_transformers_does(min_delta: float, tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    evaluate = Evaluation("heldout", every=1, patience=2, min_delta=min_delta)
    _, loop = train(tmp_path, Numbers(), msgspec.structs.replace(STAGE, steps=9, evaluate=evaluate))

    args = TrainingArguments(tmp_path / "theirs", metric_for_best_model="eval_loss", greater_is_better=False, use_cpu=True)
    callback, state, control = EarlyStoppingCallback(2, min_delta), TrainerState(), TrainerControl()
    stopped = 9
    for step in range(1, 10):
        callback.check_metric_value(args, state, control, 1 / step)
        state.best_metric = 1 / step  # which falls with every step
        if callback.early_stopping_patience_counter >= 2:
            stopped = step
            break
    assert loop.step == stopped
    assert loop.best_step == (stopped,)  # the best is kept, whatever counts for patience


def test_a_record_has_the_last_loss_and_means_of_the_last_steps() -> None:
    loop = loop_state.begin(2)
    losses = [[1 / n, 2.0] for n in range(1, 70)]
    for n, pair in enumerate(losses):
        rows = [{"loss": loss, "skipped": float(n == 68), "reward_accuracy": n % 2} for loss in pair]
        loop = loop.after_reading(1.0, 5, rows, 0)
    # as it is when a saved state is read
    loop = loop_state.decode(json.loads(json.dumps({"loop": msgspec.to_builtins(loop)})), loop_state.begin(2), Path())
    kept = [first for first, _ in losses[:-1]][-50:]
    wanted = {"last_loss": kept[-1], "mean_loss": sum(kept) / 50, "reward_accuracy": 0.5, "n_mean_steps": 50}
    assert loop.training_record() == pytest.approx(wanted)
    assert loop.training_record(1)["mean_loss"] == 2.0
    assert loop_state.begin(1).training_record() == {}


@pytest.mark.parametrize(("every", "expected"), [(0.3, [2, 4, 6]), (0.5, [3, 6]), (0.01, [1, 2, 3, 4, 5, 6]), (4, [4, 6])])
def test_evaluations_come_every_so_many_steps_or_at_a_share_of_all(every: float, expected: list[int], tmp_path: Path) -> None:
    stage = msgspec.structs.replace(STAGE, steps=6, evaluate=Evaluation("heldout", every=every))
    train(tmp_path, Numbers(), stage)
    assert [row["step"] for row in rows(tmp_path) if "heldout_loss" in row] == expected


def test_held_out_losses_are_said_when_they_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = msgspec.structs.replace(STAGE, steps=4, evaluate=Evaluation(data="heldout", every=2))
    train(tmp_path, Numbers(), stage)
    out = capsys.readouterr().out
    assert "train step 2: held-out loss 0.5000; the best so far is 0.5000 at step 2\n" in out
    assert "train step 4: held-out loss 0.2500; the best so far is 0.2500 at step 4\n" in out


def test_many_adapters_are_named_in_their_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loop = loop_state.begin(2).after_evaluation([3.0, 1.5])[0]
    with Log(tmp_path, LogConfig(), {}) as log, log.progress("train", 2) as progress:
        rows = [{"adapter": 0, "loss": 0.5, "lr": 1.0}, {"adapter": 1, "loss": 0.25, "lr": 0.1}]
        step_lines.show_step(progress, 1, rows, {}, loop)
        step_lines.say_heldout(log, "train", loop, [3.0, 1.5])
        step_lines.say_heldout(log, "train", loop_state.begin(2), [math.nan, math.nan])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train 1/2  loss 0.2500  adapter 1  lr 1.00e-01")
    assert lines[1] == "train step 0: held-out losses 3.0000, 1.5000; the best so far is 1.5000 of adapter 1 at step 0"
    assert lines[2] == "train step 0: held-out losses nan, nan; none was finite yet"
