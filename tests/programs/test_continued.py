"""Runs that are ended, continued and changed: what is kept, what runs again, and what is said."""

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitune import checkpoint
from minitune.__main__ import main
from minitune.io import paths
from minitune.programs import program
from minitune.programs.program_changes import KINDS
from minitune.programs.stages import train as train_stage
from minitune.programs.stages.evaluate import Eval
from minitune.programs.stages.train import Train
from support.paths import ROOT
from support.programs import LORA, TRAIN, evaluation, rows_without_time, start, weights

SAVE = '[[stage]]\nop = "save"\nwhat = "deltas"\n'
STAGES = evaluation("before") + LORA + TRAIN + evaluation("after") + SAVE
STOPPED = 128 + signal.SIGTERM
EVALUATE = 'train.evaluate={data="heldout",every=1}'


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Evaluations that measured something and batches that training took, in order."""
    done: list[str] = []

    def noted(kind: type, name: str, label: Callable[[Any], str]) -> None:
        real = getattr(kind, name)

        def call(self: Any, *args: Any) -> Any:
            done.append(label(self))
            return real(self, *args)

        monkeypatch.setattr(kind, name, call)

    noted(Eval, "_answer", lambda stage: stage.label)
    noted(Train, "_task", lambda stage: stage.label)
    return done


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(folder / "deltas/adapter_model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_finish_ends_training_with_the_newest_state_and_runs_the_rest(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    ran: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(3)
    assert start(tmp_path, tiny, STAGES) == STOPPED
    state = weights(tmp_path / "p")
    assert ran == ["before", "train"]
    assert main(["finish", str(tmp_path / "p")]) == 0
    assert ran == ["before", "train", "after"]
    out = capsys.readouterr().out
    assert "train: ended at step 3 of 4" in out
    result = summary(tmp_path / "p")
    assert (result["train"]["ended_at_step"], result["train"]["planned_steps"]) == (3, 4)
    assert result["steps"] == 3
    # the adapter holds the deltas of the state: PEFT's alpha / rank is 2 here, and a and b are as they trained
    saved = adapter(tmp_path / "p")
    trained = [x for name, x in state.items() if name.startswith("trainable.")]
    assert sorted(x.double().sum().item() for x in saved.values()) == pytest.approx(
        sorted(x.double().sum().item() for x in trained), abs=0
    )

    # the command again shows the table; resume = true goes on to the end that was planned
    assert start(tmp_path, tiny, STAGES) == 0
    assert "resume = true continues the training that was ended early (train at step 3)" in capsys.readouterr().out
    assert start(tmp_path, tiny, STAGES, "resume=true") == 0
    assert ran[3:] == ["train", "after"]
    assert "ended_at_step" not in summary(tmp_path / "p")["train"]
    assert start(tmp_path, tiny, STAGES, name="straight") == 0
    assert_equal(weights(tmp_path / "p"), weights(tmp_path / "straight"))
    assert rows_without_time(tmp_path / "p") == rows_without_time(tmp_path / "straight")
    assert_equal(adapter(tmp_path / "p.1"), saved)


def test_finish_with_the_best_state(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(train_stage, "heldout_losses", lambda mean, batches, state: [next(losses)])
    stop_at(3)
    assert start(tmp_path, tiny, STAGES, EVALUATE) == STOPPED
    assert main(["finish", str(tmp_path / "p"), "--best"]) == 0
    assert "train: step 2 was the best, held-out loss 1.0" in capsys.readouterr().out
    folder = tmp_path / "p/checkpoints/train/best/step-00000002/state.safetensors"
    wanted = sorted(x.double().sum().item() for x in checkpoint.load_tensors(folder).values())
    assert sorted(x.double().sum().item() for x in adapter(tmp_path / "p").values()) == wanted


def test_more_steps_continue_a_finished_run_bit_for_bit(
    tmp_path: Path,
    tiny: Path,
    ran: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # with a schedule that does not depend on the number of steps, more steps are the longer run
    assert start(tmp_path, tiny, STAGES) == 0
    first = adapter(tmp_path / "p")
    assert start(tmp_path, tiny, STAGES, "train.steps=7") == 0
    assert ran == ["before", "train", "after", "train", "after"]
    out = capsys.readouterr().out
    assert "holds another program (train.steps is 4 there and 7 here): moved to" in out
    assert "p.1; what holds of it goes on here: before, lora, train" in out.replace("before, train", "before, lora, train")
    assert "train: continuing from step 4 of 7" in out
    assert_equal(adapter(tmp_path / "p.1"), first)
    assert start(tmp_path, tiny, STAGES, "train.steps=7", name="straight") == 0
    assert_equal(weights(tmp_path / "p"), weights(tmp_path / "straight"))
    assert_equal(adapter(tmp_path / "p"), adapter(tmp_path / "straight"))
    assert rows_without_time(tmp_path / "p") == rows_without_time(tmp_path / "straight")
    assert summary(tmp_path / "p")["after"]["loss_nats"] == summary(tmp_path / "straight")["after"]["loss_nats"]


def test_more_epochs_continue_a_stopped_run_in_its_folder(
    tmp_path: Path, tiny: Path, stop_at: Callable[[int], None], ran: list[str]
) -> None:
    stop_at(2)
    assert start(tmp_path, tiny, STAGES) == STOPPED
    assert start(tmp_path, tiny, STAGES, "train.epochs=0.6") == 0
    assert not (tmp_path / "p.1").exists()
    assert ran == ["before", "train", "train", "after"]
    assert start(tmp_path, tiny, STAGES, "train.epochs=0.6", name="straight") == 0
    assert_equal(weights(tmp_path / "p"), weights(tmp_path / "straight"))


def test_fewer_steps_than_were_taken_are_another_training(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, tiny, LORA + TRAIN) == 0
    assert start(tmp_path, tiny, LORA + TRAIN, "train.epochs=0.1") == 2
    message = "train has taken 4 steps, expected at most the 1 of its program; give more steps or epochs"
    assert message in capsys.readouterr().err
    assert start(tmp_path, tiny, LORA + TRAIN, "train.steps=3") == 0
    assert summary(tmp_path / "p")["train"]["steps"] == 3
    assert start(tmp_path, tiny, LORA + TRAIN, "train.steps=3", name="straight") == 0
    assert_equal(weights(tmp_path / "p"), weights(tmp_path / "straight"))


@pytest.mark.parametrize(
    "words",
    [
        ("train.save_every=1", "train.keep=9"),
        ("log.every=3",),
        ("train.micro_batch_size=2",),
        (EVALUATE,),
        ("before.limit=1", "after.limit=1"),
        ("before.batch_size=1",),
    ],
)
def test_keys_that_do_not_change_the_work_continue_a_stopped_run(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    ran: list[str],
    words: tuple[str, ...],
) -> None:
    stop_at(2)
    assert start(tmp_path, tiny, STAGES) == STOPPED
    assert start(tmp_path, tiny, STAGES, *words) == 0
    assert not (tmp_path / "p.1").exists()
    measured_again = ["before"] if "before.limit=1" in words else []
    assert ran == ["before", "train", *measured_again, "train", "after"]
    if EVALUATE in words:
        assert summary(tmp_path / "p")["train"]["best_step"] > 2


@pytest.mark.parametrize("words", [("train.save_every=1",), ("log.every=3",), ("train.remat=true",)])
def test_they_leave_a_finished_run_finished(tmp_path: Path, tiny: Path, ran: list[str], words: tuple[str, ...]) -> None:
    assert start(tmp_path, tiny, STAGES) == 0
    assert start(tmp_path, tiny, STAGES, *words) == 0
    assert ran == ["before", "train", "after"]
    assert not (tmp_path / "p.1").exists()


def test_a_key_that_minitune_has_got_since_changes_nothing(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    ran: list[str],
) -> None:
    stop_at(2)
    assert start(tmp_path, tiny, STAGES) == STOPPED
    resolved = tmp_path / "p" / "program.toml"
    text = resolved.read_text(encoding="utf-8")
    assert "neftune_alpha = 0.0\n" in text
    resolved.write_text(text.replace("neftune_alpha = 0.0\n", ""), encoding="utf-8")
    assert start(tmp_path, tiny, STAGES) == 0
    assert ran == ["before", "train", "train", "after"]
    assert not (tmp_path / "p.1").exists()


def test_losses_on_another_table_are_not_compared(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter((1.0, 2.0, 4.0, 3.0))
    monkeypatch.setattr(train_stage, "heldout_losses", lambda mean, batches, state: [next(losses)])
    stop_at(2)
    assert start(tmp_path, tiny, STAGES, EVALUATE) == STOPPED
    other = EVALUATE.replace("heldout", "train")
    assert start(tmp_path, tiny, STAGES, other) == 0
    trained = summary(tmp_path / "p")["train"]
    assert (trained["best_step"], trained["best_heldout_nats"]) == (4, 3.0)


def test_evaluate_added_to_finished_training_leaves_its_last_step(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, tiny, STAGES) == 0
    assert start(tmp_path, tiny, STAGES, EVALUATE) == 0
    assert "no held-out loss was measured, the last step goes on" in capsys.readouterr().out
    assert_equal(adapter(tmp_path / "p"), adapter(tmp_path / "p.1"))


def test_a_finished_stage_stays_finished_when_a_later_one_changes(
    tmp_path: Path, tiny: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    dpo = TRAIN + 'name = "dpo"\nloss = { kind = "dpo" }\n'
    dpo = dpo.replace('data = "train"', 'data = "pairs"')
    stages = evaluation("before") + LORA + TRAIN + dpo + SAVE
    assert start(tmp_path, tiny, stages) == 0
    first = weights(tmp_path / "p")
    # an observer: in its folder
    assert start(tmp_path, tiny, stages + evaluation("after")) == 0
    assert ran == ["before", "train", "dpo", "after"]
    assert "running what has changed after its training" in capsys.readouterr().out
    assert not (tmp_path / "p.1").exists()
    # the second training: the first one and its evaluation hold
    assert start(tmp_path, tiny, stages + evaluation("after"), "dpo.loss.beta=0.5") == 0
    assert ran[4:] == ["dpo", "after"]
    assert "moved to" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "p"), first)
    assert start(tmp_path, tiny, stages, "dpo.loss.beta=0.5", name="straight") == 0
    assert_equal(adapter(tmp_path / "p"), adapter(tmp_path / "straight"))


def test_a_result_that_is_gone_is_made_again_without_training(
    tmp_path: Path, tiny: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, tiny, STAGES) == 0
    first = adapter(tmp_path / "p")
    for file in (tmp_path / "p/deltas").iterdir():
        file.unlink()
    (tmp_path / "p/deltas").rmdir()
    assert start(tmp_path, tiny, STAGES) == 0
    assert "is gone: making it again" in capsys.readouterr().out
    assert ran == ["before", "train", "after"]
    assert_equal(adapter(tmp_path / "p"), first)


def test_finish_says_what_it_lacks(
    tmp_path: Path,
    tiny: Path,
    stop_at: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*words: str) -> str:
        assert main(["finish", *words]) == 2
        return capsys.readouterr().err

    assert "finish: nothing does not exist, expected the folder of a run, such as runs/lora" in refused("nothing")
    assert "the following arguments are required: RUN" in refused()
    stop_at(2)
    assert start(tmp_path, tiny, STAGES) == STOPPED
    folder = str(tmp_path / "p")
    assert "has kept no best state of train, expected evaluate =" in refused(folder, "--best")
    states = tmp_path / "p/checkpoints/train"
    states.rename(tmp_path / "aside")
    assert "has no saved state of train, expected one to finish with; run its program longer" in refused(folder)
    (tmp_path / "aside").rename(states)
    assert main(["finish", folder]) == 0
    assert "p is finished, expected a run whose training can end" in refused(folder)


PAGE = (ROOT / "docs/runs.md").read_text("utf-8")


def test_the_page_says_how_far_the_rate_jumps() -> None:
    (jump,) = re.findall(r"from (\d+) % of the peak to (\d+) %", PAGE)
    schedule = program.load(paths.shipped()["lora"]).stage[2].schedule
    end, n_warmup = 0.02, 20

    def factor(step: int, steps: int) -> float:
        share = (step - n_warmup) / (steps - n_warmup)
        return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2

    wanted = factor(449, 450), factor(450, 900)
    assert [float(schedule.factor(torch.tensor(s), n)) for s, n in ((449, 450), (450, 900))] == pytest.approx(wanted)
    assert tuple(round(100 * x) for x in wanted) == tuple(map(int, jump))


def test_the_page_names_every_key_that_restarts_nothing() -> None:
    (section,) = re.findall(r"## Keys that change nothing\n(.*?)\n##", PAGE, re.S)
    named = {*re.findall(r"`([\w.]+)`", section)}
    assert {key for kind in KINDS.values() for key in kind.free_keys} <= named
    assert {"out", "name", "resume", "train.evaluate"} <= named
