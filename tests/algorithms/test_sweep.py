"""Many adapters at once are the same adapters one after another: functions first, then the stage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.algorithms import sweep
from minitune.algorithms.supervised import sft
from minitune.autodiff.remat import remat
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import FAMILIES, Model
from minitune.models.families import llama
from minitune.optim import transforms
from minitune.optim.adamw import AdamW
from minitune.optim.schedules import Cosine, ScaleBySchedule
from minitune.optim.sgd import SGD
from minitune.optim.transforms import Chain, ClipByGlobalNorm, ScaleByGlob
from minitune.quant.schemes import Int8, quantize
from minitune.steps import train_step
from minitune.types import Batch, TrainState
from support.experts import small_experts
from support.models import SMALL, configs, random_batch, random_params
from support.scripts import run_script

TARGETS = ("*.self_attn.*_proj.weight", "*.mlp.*_proj.weight")


def rule(rank: int, alpha: float, targets: tuple[str, ...] = TARGETS, **more: object) -> Lora:
    return Lora(rank, alpha, targets, **more)


def chain(lr: float, clip: float = 0.3, total: int = 12, **adam: float) -> Chain:
    schedule = ScaleBySchedule(Cosine(warmup_steps=2), total)
    return transforms.chain(ClipByGlobalNorm(clip), AdamW(lr=lr, **adam), schedule)


def batches(config: llama.Config, n: int, n_steps: int, rows: int, length: int) -> list[Batch]:
    """One batch a step, with leaves [n, rows, length]: every adapter has data of its own."""

    def one(step: int) -> Batch:
        each = [random_batch(config, rows, length, seed=1000 * step + i) for i in range(n)]
        return Batch(*(torch.stack(x) for x in zip(*each, strict=True)))

    return [one(step) for step in range(n_steps)]


def fresh(own: Lora, params: dict, seed: int) -> dict:
    """Deltas in the dtype of the parameters."""
    return tree.map(lambda x: x.to(params["model.norm.weight"].dtype), own.init(params, seed))


def alone(model: Model, params: dict, own: Lora, optimizer: object, seed: int, data: list[Batch], micro: int) -> tuple:
    """(deltas, optimizer state, metrics of all steps) of one adapter trained by itself."""
    deltas = fresh(own, params, seed)
    state, history = optimizer.init(deltas), []
    step = train_step(sft(model, own), optimizer, micro_batch=micro)
    for batch in data:
        (deltas, state), metrics = step.update(params, TrainState(deltas, state), batch)
        history.append(metrics)
    return deltas, state, history


def swept(
    model: Model, params: dict, rules: list[Lora], optimizers: list, seeds: list[int], data: list[Batch], micro: int
) -> tuple:
    deltas = sweep.stack([fresh(own, params, seed) for own, seed in zip(rules, seeds, strict=True)])
    states, history = (
        [optimizer.init(part) for optimizer, part in zip(optimizers, sweep.unstack(deltas, len(rules)), strict=True)],
        [],
    )
    step = sweep.sweep_step(model, CrossEntropy(), rules, optimizers, micro_batch=micro)
    for batch in data:
        (deltas, states), metrics = step.update(params, TrainState(deltas, states), batch)
        history.append(metrics)
    return deltas, states, history


def assert_close(actual: tree.Tree, wanted: tree.Tree, tolerance: float) -> None:
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(wanted))
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * scale), actual, wanted)


def assert_each_is_itself_alone(
    model: Model, params: dict, rules: list[Lora], optimizers: list, seeds: list[int], data: list[Batch], micro: int, near: float
) -> None:
    """Deltas within `near` of those of a run alone, as a share of the largest; metrics within ten times that; pads zero."""
    stacked, _, history = swept(model, params, rules, optimizers, seeds, data, micro)
    for i, (own, optimizer, seed) in enumerate(zip(rules, optimizers, seeds, strict=True)):
        mine = [Batch(*(x[i] for x in batch)) for batch in data]
        wanted, _, metrics = alone(model, params, own, optimizer, seed, mine, micro)
        assert_close(sweep.adapter(stacked, i, own), wanted, near)
        for ours, theirs in zip(history, metrics, strict=True):
            assert_close({name: x[i] for name, x in ours.items()}, theirs, 10 * near)
        for name, delta in stacked.items():
            assert not delta.a[i, ..., own.rank_of(name) :, :].any()
            assert not delta.b[i, ..., own.rank_of(name) :].any()


@settings(max_examples=4)
@given(
    config=configs(),
    points=st.lists(
        st.tuples(st.integers(1, 5), st.floats(1, 8), st.floats(1e-4, 1e-2), st.integers(0, 9)), min_size=1, max_size=3
    ),
    rows=st.integers(1, 2),
    micro=st.integers(1, 3),
    dora=st.booleans(),
    rematted=st.booleans(),
    wide=st.booleans(),
)
def test_each_adapter_takes_the_steps_that_it_takes_alone(
    config: llama.Config, points: list[tuple], rows: int, micro: int, dora: bool, rematted: bool, wide: bool
) -> None:
    model = Model(llama.FAMILY, config, remat) if rematted else Model(llama.FAMILY, config)
    params, data = (
        random_params(config, dtype=torch.float64 if wide else torch.float32),
        batches(config, len(points), 11, rows, 9),
    )
    rules = [rule(rank, alpha, dora=dora, rslora=i % 2 == 1) for i, (rank, alpha, _, _) in enumerate(points)]
    # with Adam's usual eps, a gradient that is zero but for rounding would move a float32 weight as much as any other
    optimizers = [chain(lr, weight_decay=0.1, eps=1e-8 if wide else 1e-3) for _, _, lr, _ in points]
    seeds = [seed for *_, seed in points]
    assert_each_is_itself_alone(model, params, rules, optimizers, seeds, data, micro, 1e-10 if wide else 1e-6)


CASES = {  # family, targets, whether the base is quantized
    "experts by themselves": ("mixtral", ("*.experts.*", "*.q_proj.weight"), False),
    "experts in one tensor": ("gpt_oss", ("*.experts.down_proj", "*.experts.gate_up_proj"), False),
    "a router and a shared expert": ("qwen2_moe", ("*.gate.weight", "*.shared_expert.*"), False),
    "the head": ("llama", ("lm_head.weight", "*.v_proj.weight"), False),
    "a quantized base": ("llama", TARGETS, True),
    "two adapters a forward": ("llama", TARGETS, False),
}


@pytest.mark.parametrize("name", CASES)
def test_each_adapter_is_itself_alone_whatever_is_adapted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, targets, quantized = CASES[name]
    config = SMALL if family == "llama" else small_experts(family)
    params = random_params(config)
    if name == "two adapters a forward":
        monkeypatch.setattr(sweep, "CPU_HIDDEN_ELEMENTS", 2 * 9 * config.d_model)
    if quantized:
        params = {key: quantize(w, Int8()) if key.endswith("_proj.weight") else w for key, w in params.items()}
    model = Model(FAMILIES[family], config)
    rules = [rule(rank, 3.0, targets, dora=quantized) for rank in (2, 1, 3)]
    optimizers = [chain(lr, eps=1e-3) for lr in (0.01, 0.002, 0.03)]
    assert_each_is_itself_alone(model, params, rules, optimizers, [4, 5, 6], batches(config, 3, 3, 2, 9), 1, 1e-6)


def test_an_adapter_that_breaks_is_skipped_and_the_others_step_as_if_alone() -> None:
    model, params, own = Model(llama.FAMILY, SMALL), random_params(SMALL), rule(2, 3.0)
    (batch,) = batches(SMALL, 3, 1, 2, 9)
    starts = [own.init(params, seed) for seed in range(3)]
    starts[1] = tree.map(lambda x: torch.full_like(x, torch.inf), starts[1])
    optimizers = [
        chain(0.01, eps=1e-3),
        SGD(0.1),
        transforms.chain(AdamW(0.02, eps=1e-3), ScaleByGlob({"*.b": 3.0})),
    ]
    states = [optimizer.init(start) for optimizer, start in zip(optimizers, starts, strict=True)]
    step = sweep.sweep_step(model, CrossEntropy(), [own] * 3, optimizers, micro_batch=2)
    (stacked, after), metrics = step.update(params, TrainState(sweep.stack(starts), states), batch)
    assert metrics["skipped"].tolist() == [0.0, 1.0, 0.0]
    for i, optimizer in enumerate(optimizers):
        one = train_step(sft(model, own), optimizer, micro_batch=2)
        (wanted, state), _ = one.update(params, TrainState(starts[i], states[i]), Batch(*(x[i] for x in batch)))
        torch.testing.assert_close(sweep.adapter(stacked, i, own), wanted, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(after[i], state, rtol=0.0, atol=1e-6)


def test_the_block_of_all_adapters_is_compiled_twice_whatever_the_depth() -> None:
    """Once for the first layer, whose input needs no gradient. In a process of its own: torch can't trace the checks of
    signatures that the tests run under."""
    assert run_script("sweep_compiled") == "2\n"
