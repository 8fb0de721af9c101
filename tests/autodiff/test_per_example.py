"""Gradients of single examples equal a loop's; DP-SGD on top: clipped, noised, and plain SGD where neither happens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.algorithms import dp_sgd
from minitune.algorithms.dp_sgd import Privacy
from minitune.algorithms.supervised import sft
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import per_example, value_and_grad
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.sgd import SGD
from minitune.types import Batch, Mean
from support.models import SMALL, configs, random_batch, random_deltas, random_params

RULE = Lora(2, 4.0, ("*_proj.weight",))
SEEDS = st.integers(0, 2**32)


def of_a_row(model: Model, params: dict[str, torch.Tensor]) -> object:
    objective = sft(model, RULE)
    return lambda trainable, row: objective(trainable, params, tree.map(lambda x: x[None], row))[0]


@settings(max_examples=8)
@given(config=configs(), seed=SEEDS, rows=st.integers(1, 5), chunk=st.integers(1, 6), whole=st.booleans(), wide=st.booleans())
def test_per_example_is_a_loop(config: llama.Config, seed: int, rows: int, chunk: int, whole: bool, wide: bool) -> None:
    params = random_params(config, seed, torch.float64 if wide else torch.float32)
    batch, model = random_batch(config, rows, 9, seed), Model(llama.FAMILY, config, remat if seed % 2 else lambda f: f)
    trainable = dict(params) if whole else random_deltas(params, RULE, seed)
    fn = of_a_row(model, params)
    means, grads = per_example(fn, chunk=chunk)(trainable, batch)
    for i in range(rows):
        mean, wanted = value_and_grad(lambda t, i=i: fn(t, Batch(*(x[i] for x in batch))))(trainable)
        scale = max(float(g.abs().max()) for g in tree.leaves(wanted)) or 1.0
        tolerance = 1e-10 if wide else 1e-5
        for per_row, g in zip(tree.leaves(grads), tree.leaves(wanted), strict=True):
            torch.testing.assert_close(per_row[i], g, rtol=0.0, atol=tolerance * scale)
        torch.testing.assert_close(Mean(means.total[i], means.weight[i]), mean, rtol=tolerance, atol=tolerance)


def test_per_example_of_a_function_of_ones_own_and_what_it_refuses() -> None:
    w, x = {"w": torch.tensor([1.0, 2.0])}, torch.arange(6.0).view(3, 2)
    means, grads = per_example(lambda t, x: Mean((t["w"] * x).sum().square(), torch.tensor(1.0)), chunk=2)(w, x)
    dots = x @ w["w"]
    torch.testing.assert_close(means.total, dots**2)
    torch.testing.assert_close(grads["w"], 2 * dots[:, None] * x)
    with pytest.raises(TypeError, match=r"grad: w is torch\.int64, expected a floating-point tensor"):
        per_example(lambda t, x: Mean(x.sum(), x.sum()), chunk=2)({"w": torch.tensor([1])}, x)


@given(seed=SEEDS, rows=st.integers(1, 6), max_norm=st.floats(0.01, 10.0), spread=st.floats(0.01, 30.0))
def test_no_example_adds_more_than_the_clipping_norm_and_a_broken_one_nothing(
    seed: int, rows: int, max_norm: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = {
        "a": spread * torch.randn(rows, 3, 2, generator=generator),
        "b": (spread * torch.randn(rows, 5, generator=generator),),
    }
    total, norms = dp_sgd.clipped_sum(grads, max_norm)
    wanted = tree.map(lambda g: torch.zeros_like(g[0]), grads)
    for i in range(rows):
        own = tree.map(lambda g, i=i: g[i], grads)
        norm = float(tree.norm(own))
        assert float(norms[i]) == pytest.approx(norm, rel=1e-5)
        one = dp_sgd.clipped_sum(tree.map(lambda g: g[None], own), max_norm)[0]
        assert float(tree.norm(one)) <= max_norm * (1 + 1e-5)
        wanted = tree.map(lambda w, g, n=norm: w + g * min(1.0, max_norm / n), wanted, own)
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)
    broken = tree.map(lambda g: torch.cat([g, torch.full_like(g[:1], math.nan)]), grads)
    torch.testing.assert_close(dp_sgd.clipped_sum(broken, max_norm)[0], total)


def test_the_noise_has_the_stated_variance_and_is_a_function_of_seed_step_and_leaf() -> None:
    zeros = {"a": torch.zeros(150, 200), "b": torch.zeros(150, 200)}
    one = dp_sgd.noised(zeros, 0.7, 3, 5)
    for x in one.values():
        assert float(x.mean()) == pytest.approx(0.0, abs=5 * 0.7 / 30000**0.5)
        assert float(x.var()) == pytest.approx(0.49, rel=5 * (2 / 30000) ** 0.5)
    assert abs(float((one["a"] * one["b"]).mean())) < 5 * 0.49 / 30000**0.5
    assert torch.equal(one["a"], dp_sgd.noised(zeros, 0.7, 3, 5)["a"])
    for seed, step in ((4, 5), (3, 6)):
        assert not torch.equal(one["a"], dp_sgd.noised(zeros, 0.7, seed, step)["a"])


@pytest.mark.parametrize("donate", [False, True])
def test_without_clipping_and_noise_it_is_sgd_on_the_mean_of_the_rows(donate: bool) -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL, dtype=torch.float64)
    batch = random_batch(SMALL, 5, 11, packed=False)
    batch = batch._replace(loss_mask=torch.ones_like(batch.loss_mask), segment_ids=torch.ones_like(batch.segment_ids))
    optimizer, trainable = SGD(lr=0.1), random_deltas(params, RULE, 1)
    step = dp_sgd.private_step(sft(model, RULE), optimizer, Privacy(1e9, 0.0, 0, chunk=2), donate=donate)
    given_ = tree.map(torch.clone, trainable)
    (new, state), metrics = step.update(params, step.init(given_), batch)
    mean, grads = value_and_grad(lambda t: sft(model, RULE)(t, params, batch)[0])(trainable)
    wanted = tree.map(lambda p, g: p - 0.1 * g / mean.weight, trainable, grads)  # rows of one length: their mean is the mean
    torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-11)
    assert float(metrics["loss_nats"]) == pytest.approx(float(mean.value()), rel=1e-6)
    assert metrics["clipped_share"] == metrics["skipped"] == 0
    assert int(state.step) == 1
    assert (tree.leaves(new)[0] is tree.leaves(given_)[0]) == donate


def test_a_private_step_moves_by_the_clipped_noised_mean() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    batch, trainable, optimizer = random_batch(SMALL, 4, 11), random_deltas(params, RULE, 1), SGD(lr=1.0)
    objective, privacy = sft(model, RULE), Privacy(0.05, 2.0, seed=7, chunk=3)
    step = dp_sgd.private_step(objective, optimizer, privacy)
    start = step.init(trainable)
    start = start._replace(opt_state=start.opt_state._replace(step=torch.tensor(9)))
    (new, after), metrics = step.update(params, start, batch)

    def mean(t: tree.Tree, row: Batch) -> Mean:
        value = objective(t, params, tree.map(lambda x: x[None], row))[0]
        return Mean(value.value(), value.weight)

    total, norms = dp_sgd.clipped_sum(per_example(mean, chunk=4)(trainable, batch)[1], 0.05)
    wanted = tree.map(lambda p, g: p - g / 4, trainable, dp_sgd.noised(total, 0.1, 7, 9))
    torch.testing.assert_close(new, wanted)
    assert float(metrics["clipped_share"]) == float((norms > 0.05).float().mean())
    assert int(after.step) == 10
