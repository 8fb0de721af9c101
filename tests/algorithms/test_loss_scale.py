"""Loss scaling of float16 compute: the scales of torch.amp.GradScaler, the steps of float32, and a state that resumes."""

import json
from pathlib import Path

import pytest
import torch

from minitune import tree
from minitune.algorithms import sweep
from minitune.algorithms.loss_scale import LossScale
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim import transforms
from minitune.optim.adamw import AdamW
from minitune.optim.sgd import SGD
from minitune.steps import train_step
from minitune.types import Batch, Mean
from support.closeness import assert_trees_close
from support.models import SMALL, random_batch, random_params
from support.programs import LORA, TRAIN, rows_without_time, run, run_killed, weights

RULE = Lora(3, 5.0, ("*_proj.weight",))
MODEL = Model(llama.FAMILY, SMALL)
OVERFLOWS = (False, True, True, False, False, False, False, False, True, False, False, False, False, False, False)


def linear(trainable: dict, params: dict, batch: Batch) -> tuple[Mean, dict]:
    """Loss whose gradient is what the rows hold."""
    x = batch.loss_mask.to(torch.float32) * batch.tokens
    return Mean((x * trainable["w"]).sum(), torch.tensor(float(x.numel()))), {}


def rows(value: float) -> Batch:
    ones = torch.ones(3, 4, dtype=torch.int64)
    return Batch(ones, ones, torch.full((3, 4), value))


def test_the_scale_goes_as_that_of_torchs_grad_scaler() -> None:
    rule = LossScale(initial=64.0, growth_interval=3)
    step = train_step(linear, SGD(lr=0.5), loss_scale=rule)
    state, scales = step.init({"w": torch.tensor(0.0)}), []
    parameter = torch.nn.Parameter(torch.tensor(0.0))
    theirs, optimizer, wanted = torch.amp.GradScaler("cpu", 64.0, growth_interval=3), torch.optim.SGD([parameter], 0.5), []
    for overflow in OVERFLOWS:
        value = float("inf") if overflow else 0.25
        state, metrics = step.update({}, state, rows(value))
        scales.append(float(metrics["loss_scale"]))
        assert bool(metrics["skipped"]) == overflow
        assert int(metrics["not_finite"]) == (0 if overflow else -1)

        wanted.append(theirs.get_scale())
        optimizer.zero_grad()
        theirs.scale(parameter * value).backward()
        theirs.step(optimizer)
        theirs.update()
    assert scales == wanted
    assert set(scales) == {16.0, 32.0, 64.0}
    torch.testing.assert_close(state.trainable["w"], parameter.detach())


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("donate", [False, True])
def test_a_scaled_step_is_the_step(micro_batch: int | None, donate: bool) -> None:
    params, batch = random_params(SMALL), random_batch(SMALL, 5, 13)
    optimizer = transforms.chain(transforms.ClipByGlobalNorm(0.3), AdamW(lr=1e-2, eps=1e-3))
    objective, start = sft(MODEL, RULE), RULE.init(params, 0)
    ends = []
    for rule in (None, LossScale(initial=2.0**9)):
        step = train_step(objective, optimizer, micro_batch=micro_batch, loss_scale=rule, donate=donate)
        state = step.init(tree.map(torch.clone, start))
        for _ in range(3):
            state, metrics = step.update(params, state, batch)
        inner = state.opt_state.inner if rule else state.opt_state
        ends.append((state.trainable, inner, {k: v for k, v in metrics.items() if k != "loss_scale"}))
    assert_trees_close(ends[1], ends[0], 1e-5)


def test_float16_compute_follows_float32_and_small_gradients_need_the_scale() -> None:
    params, batch = random_params(SMALL), random_batch(SMALL, 5, 13)
    narrow = {name: w.half() for name, w in params.items()}
    wide = {name: w.float() for name, w in narrow.items()}
    start = tree.map(lambda x: x + 0.1, RULE.init(params, 0))
    optimizer = SGD(lr=1.0)

    def end(given: dict, rule: LossScale | None, small: float = 1.0) -> dict:
        def objective(*args: object) -> tuple[Mean, dict]:
            mean, readings = sft(MODEL, RULE)(*args)
            return Mean(mean.total * small, mean.weight), readings

        step = train_step(objective, optimizer, loss_scale=rule)
        after = step.update(given, step.init(start), batch)[0].trainable
        return tree.map(lambda x, y: (x - y) / small, after, start)

    wanted = end(wide, None)
    assert_trees_close(end(narrow, LossScale()), wanted, 0.02)
    assert_trees_close(end(narrow, LossScale(initial=2.0**24), 2.0**-16), wanted, 0.05)
    with pytest.raises(AssertionError):  # without the scale they are zero or coarse
        assert_trees_close(end(narrow, None, 2.0**-16), wanted, 0.05)


def test_adapters_of_a_sweep_have_a_scale_each_that_goes_as_alone() -> None:
    params, rules = random_params(SMALL), [RULE, Lora(2, 3.0, ("*_proj.weight",))]
    starts = [rule.init(params, i) for i, rule in enumerate(rules)]
    starts[1] = tree.map(lambda x: torch.full_like(x, 1e30), starts[1])  # which overflows
    optimizers, scale = [AdamW(lr=1e-2, eps=1e-3)] * 2, LossScale(initial=32.0, growth_interval=2)
    all_step = sweep.sweep_step(MODEL, CrossEntropy(), rules, optimizers, micro_batch=2, loss_scale=scale)
    state, history = all_step.init(sweep.stack(starts)), []
    batches = [random_batch(SMALL, 3, 9, seed=i) for i in range(3)]
    for batch in batches:
        state, metrics = all_step.update(params, state, tree.map(lambda x: x.expand(2, *x.shape), batch))
        history.append(metrics["loss_scale"].tolist())
    step = train_step(sft(MODEL, RULE), optimizers[0], micro_batch=2, loss_scale=scale)
    alone = step.init(starts[0])
    for batch in batches:
        alone, _ = step.update(params, alone, batch)
    assert history == [[32.0, 32.0], [32.0, 16.0], [64.0, 8.0]]
    assert_trees_close(sweep.adapter(state.trainable, 0, RULE), alone.trainable, 1e-5)
    assert metrics["not_finite"].tolist()[0] == -1
    assert metrics["not_finite"].tolist()[1] >= 0


def test_what_trains_is_not_in_float16() -> None:
    step = train_step(linear, SGD(lr=0.5), loss_scale=LossScale())
    with pytest.raises(TypeError, match=r"loss_scale: w trains in float16, expected float32"):
        step.init({"w": torch.zeros(3, dtype=torch.float16)})


def test_a_program_in_float16_logs_its_scale_and_resumes_with_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = LORA + TRAIN + "loss_scale = { initial = 256.0, growth_interval = 2 }\n"
    words = ("model.dtype=float16", "model.device=cpu", "train.steps=5")
    run(tmp_path, tiny, stages, *words, name="straight")
    lines = (tmp_path / "straight/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loss_scale"] for line in lines] == [256.0, 256.0, 512.0, 512.0, 1024.0]
    assert "not_finite" not in json.loads(lines[0])
    run_killed(tmp_path, tiny, stages, *words, after_step=3, monkeypatch=monkeypatch)
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert "opt_state.scaling.scale" in one
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "killed")
