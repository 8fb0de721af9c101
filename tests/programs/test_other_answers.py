"""Answers of the state of training that does not go on, kept for the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitune.errors import InputError
from minitune.programs.stages.evaluate import Eval
from minitune.programs.stages.train import Train
from support.programs import LORA, TRAIN, evaluation, run


def evaluated(keep: str) -> str:
    return TRAIN + f'evaluate = {{ data = "heldout", every = 1, keep = "{keep}" }}\n'


def with_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Have the evaluations of training measure these losses, one after the other."""
    given = iter(losses)
    monkeypatch.setattr(Train, "_heldout", lambda *_: [next(given)])


def program(keep: str) -> str:
    asked = [evaluation(name).replace("max_new_tokens = 2", "max_new_tokens = 12") for name in ("before", "after")]
    return asked[0] + LORA + evaluated(keep) + asked[1]


def answers(samples: list[dict]) -> list[str]:
    return [sample["answer"] for sample in samples]


def test_the_other_state_answers_as_it_does_where_it_goes_on(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = {}
    for keep in ("best", "last"):
        with_losses(monkeypatch, [2.0, 1.0, 3.0, 4.0])
        found[keep] = run(tmp_path, tiny, program(keep), "train.optimizer.lr=1", name=keep)
    best, last = (found[keep]["train"]["other_answers"] for keep in ("best", "last"))
    assert (best["state"], best["step"]) == ("last", 4)
    assert (last["state"], last["step"]) == ("best", 2)
    assert answers(best["samples"]) == answers(found["last"]["after"]["samples"])
    assert answers(last["samples"]) == answers(found["best"]["after"]["samples"])
    assert answers(best["samples"]) != answers(last["samples"])
    page = (tmp_path / "best/report.html").read_text(encoding="utf-8")
    assert "after (best: step 2)" in page
    assert "last of train: step 4" in page

    # a run that was stopped after its training keeps the answers that it has
    def refused(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(Eval, "first_samples", refused)
    folder = tmp_path / "best"
    records = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    del records["after"]
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "summary.json").unlink()
    again = run(tmp_path, tiny, program("best"), "train.optimizer.lr=1", name="best")
    assert again["train"]["other_answers"] == best
    assert again["after"]["samples"] == found["best"]["after"]["samples"]


@pytest.mark.parametrize(
    ("losses", "stages"),
    [
        ([4.0, 3.0, 2.0, 1.0], program("best")),  # the best is the last
        ([2.0, 1.0, 3.0, 4.0], LORA + evaluated("best")),  # nobody asks
        ([2.0, 1.0, 3.0, 4.0], LORA + evaluated("best") + evaluation("after") + "samples = 0\n"),
    ],
)
def test_where_no_other_answer_is_shown_none_is_asked_for(
    losses: list[float], stages: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_losses(monkeypatch, losses)
    assert "other_answers" not in run(tmp_path, tiny, stages)["train"]


@pytest.mark.parametrize("error", [InputError("weights are not finite"), torch.OutOfMemoryError("no room")])
def test_a_state_that_can_not_answer_ends_no_run(
    error: Exception, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise error

    with_losses(monkeypatch, [2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(Eval, "first_samples", failing)
    summary = run(tmp_path, tiny, program("best"))
    assert "other_answers" not in summary["train"]
    assert f"train: no sample answers of the last state: {error}" in capsys.readouterr().out
