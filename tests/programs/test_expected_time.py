"""The time and the memory that a run says it will take: arithmetic on measured steps, and lines in a run."""

import re
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from minitune.models.families import llama
from minitune.models.model import Model
from minitune.optim.adamw import AdamW
from minitune.planning.mesh import Mesh
from minitune.programs import plan, plan_fit, program
from minitune.programs import run as program_run
from minitune.programs.plan import Planned
from minitune.programs.plan_fit import Fit, check_memory
from minitune.programs.plan_process import LIBRARY_BYTES
from minitune.programs.stages import expected_time
from minitune.programs.stages.evaluate import Eval
from minitune.programs.stages.expected_time import ExpectedTime, duration, evaluations_left, later_stages
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_stage import Evaluation
from minitune.programs.state import AbstractState
from support.programs import LORA, SHIPPED, TRAIN, evaluation, run, start

STAGE = Train(data="train", steps=1000, batch_size=2, optimizer=AdamW(lr=1e-3))
EVALUATED = "\n[stage.evaluate]\ndata = 'heldout'\nevery = 2\n"


def lines(stage: Train, times: list[tuple[float, int]], tokens: int = 700, share: float = 0.5, later: str = "") -> list[str]:
    """What is said over steps that take so long, for so many tokens."""
    expected = ExpectedTime(stage, lambda: tokens, share, lambda: later)
    said = [expected.after_step(step, *one) for step, one in enumerate(times, 1)]
    return [line for line in said if line is not None]


def test_the_first_step_does_not_count_and_the_others_are_multiplied() -> None:
    times = [(90.0, 10), (1.0, 100), (1.5, 100), (2.0, 150), (50.0, 10)]
    # 996 steps of (1 + 1.5 + 2) / 3 s are 24.9 min, whatever comes after
    assert lines(STAGE, times) == ["train: about 25 min left for 996 steps of 1.5 s"]
    # with 20 evaluations of 700 / 350 * 4.5 * 0.5 s
    evaluated = msgspec.structs.replace(STAGE, evaluate=Evaluation(data="heldout", every=0.05))
    (line,) = lines(evaluated, times, later="; then save")
    assert line == "train: about 26 min left for 996 steps of 1.5 s and 20 evaluations of 4.5 s; then save"


def test_short_steps_are_measured_for_longer_and_short_runs_say_nothing() -> None:
    short = [(1.0, 10)] + [(0.1, 10)] * 30
    (line,) = lines(STAGE, short)
    assert re.match(r"train: about 2 min left for 97[89] steps of 0.1 s", line)
    assert lines(msgspec.structs.replace(STAGE, steps=100), short) == []
    assert lines(STAGE, short[:3]) == []


def test_evaluations_that_are_left_are_those_that_are_due() -> None:
    for every, steps in ((7, 50), (0.1, 33), (60, 50)):
        stage = msgspec.structs.replace(STAGE, steps=steps, evaluate=Evaluation(data="heldout", every=every))
        for step in (0, 6, 7, steps - 1, steps):
            due = [one for one in range(1, steps + 1) if one > step and stage.evaluate.is_due(one, steps)]
            assert evaluations_left(stage, step) == len(due)
    assert evaluations_left(STAGE, 3) == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 s"),
        (89.0, "about 89 s"),
        (100.0, "about 2 min"),
        (5000.0, "about 83 min"),
        (5400.0, "about 1.5 h"),
        (4e5, "about 4.6 days"),
    ],
)
def test_durations_are_what_people_say(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_run_says_its_memory_its_time_and_what_follows(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(expected_time, "LEAST_MEASURED_S", 0.0)
    monkeypatch.setattr(expected_time, "LEAST_TOLD_S", 0.0)
    needs = "train: 4 x 256 tokens at a time need 7.0 MiB, 700% of 1 MiB: does not fit"
    monkeypatch.setattr(plan_fit, "LEAST_PARAMETERS", 0)
    monkeypatch.setattr(program_run, "fit", lambda one: Fit(7 * 2**20, 2**20, [needs], []))
    stages = evaluation("before") + LORA + TRAIN.replace("steps = 4", "steps = 6") + EVALUATED + evaluation("after")
    run(tmp_path, tiny, stages + '[[stage]]\nop = "save"\nwhat = "deltas"\n')
    said = capsys.readouterr().out
    found = re.search(r"train: about \d+ \w+ left for (\d+) steps of \S+ s and (\d+) evaluations of \S+ s; then (.*)\n", said)
    assert found is not None
    assert found.group(1, 2) == ("2", "1")
    assert re.fullmatch(r"after \(about \d+ s, as before\), save", found[3])
    assert said.index(needs) < said.index("one epoch is") < said.index("left for")
    beside = re.search(r"train: planned ([\d,]+) MiB, measured ([\d,]+) MiB \(([\d,]+)%\)", said)
    assert beside is not None, said
    n_planned, measured, share = (int(one.replace(",", "")) for one in beside.groups())
    assert n_planned > LIBRARY_BYTES / 2**20
    assert share == pytest.approx(100 * measured / n_planned, abs=1)


def test_memory_is_planned_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = Eval(data="heldout", batch_size=2)
    step = SimpleNamespace(device=torch.device("cpu"), params={"model.embed_tokens.weight": torch.ones(1)}, mesh=Mesh())
    one, other = (Planned(stage, step, {"weights": 5}, 0.0) for stage in (STAGE, evaluated))
    monkeypatch.setattr(plan_fit, "planned", lambda source, first, target: [one, other])
    asked = program.load(SHIPPED["lora"])
    for shapes, plans in (
        ([(49_999, 1000)], {}),
        ([(50_000, 1000)], {"train": one}),
        ([(49_999, 1000), (1000,)], {"train": one}),
    ):
        params = {str(n): torch.empty(shape, device="meta") for n, shape in enumerate(shapes)}
        first = AbstractState({}, Model(llama.FAMILY, None), params)
        assert check_memory(asked, first, Mesh()) == plans


def test_a_run_that_can_not_fit_is_refused_before_it_has_a_folder_unless_told_otherwise(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_fit, "LEAST_PARAMETERS", 0)
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: 352 * 2**20 + 5_500_000)
    monkeypatch.setattr(plan, "process_bytes", lambda *_: 352 * 2**20)
    asked = LORA + TRAIN.replace("batch_size = 4", "batch_size = 64")
    assert start(tmp_path, tiny, asked) == 2
    said, error = capsys.readouterr()
    assert re.search(r"train: 64 x 256 tokens at a time need [\d.]+ MiB, \d+% of the 357 MiB", said)
    assert "# in the stage train\nmicro_batch_size = " in said
    assert re.search(r"plan: train needs \d+ MiB, expected at most the 357 MiB that are there; .* set must_fit = false", error)
    assert not list(tmp_path.glob("runs/*"))
    assert start(tmp_path, tiny, asked, "must_fit=false", "train.steps=1") == 0
    assert "does not fit" in capsys.readouterr().out


def test_stages_that_follow_without_a_like_have_no_time() -> None:
    stages = {
        "before": STAGE,
        "train": msgspec.structs.replace(STAGE, steps=3),
        "after": msgspec.structs.replace(STAGE, name="after"),
    }
    assert later_stages("train", stages, {"before": {"time_s": 61.0}}) == "; then after (about 61 s, as before)"
    assert later_stages("train", stages, {"before": {}}) == "; then after"
    assert later_stages("after", stages, {}) == later_stages("unknown", {}, {}) == ""
