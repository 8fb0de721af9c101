"""Many adapters at once are the same adapters one after another: functions first, then the stage."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import configs, random_batch, random_params

from minitune import objectives, optim, sweep, tree
from minitune.grad import remat
from minitune.lora import Lora
from minitune.losses import CrossEntropy
from minitune.models import Model, llama
from minitune.steps import train_step
from minitune.types import Batch

TARGETS = ("*.self_attn.*_proj.weight", "*.mlp.*_proj.weight")


def rule(rank: int, alpha: float, **more: object) -> Lora:
    return Lora(rank, alpha, TARGETS, **more)


def chain(lr: float, clip: float = 0.3, total: int = 12, **adam: float) -> optim.Chain:
    schedule = optim.ScaleBySchedule(optim.Cosine(warmup_steps=2), total)
    return optim.chain(optim.ClipByGlobalNorm(clip), optim.AdamW(lr=lr, **adam), schedule)


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
    state, told = optimizer.init(deltas), []
    step = train_step(objectives.sft(model, CrossEntropy(), own), optimizer, micro_batch=micro)
    for batch in data:
        deltas, state, metrics = step(params, deltas, state, batch)
        told.append(metrics)
    return deltas, state, told


def swept(
    model: Model, params: dict, rules: list[Lora], optimizers: list, seeds: list[int], data: list[Batch], micro: int
) -> tuple:
    deltas = sweep.stack([fresh(own, params, seed) for own, seed in zip(rules, seeds, strict=True)])
    states, told = [optimizer.init(part) for optimizer, part in zip(optimizers, sweep.each(deltas, len(rules)), strict=True)], []
    step = sweep.sweep_step(model, CrossEntropy(), rules, optimizers, micro_batch=micro)
    for batch in data:
        deltas, states, metrics = step(params, deltas, states, batch)
        told.append(metrics)
    return deltas, states, told


def assert_close(found: tree.Tree, wanted: tree.Tree, tolerance: float) -> None:
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(wanted))
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * scale), found, wanted)


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
    model = Model(llama, config, remat) if rematted else Model(llama, config)
    params, data = (
        random_params(config, dtype=torch.float64 if wide else torch.float32),
        batches(config, len(points), 11, rows, 9),
    )
    rules = [rule(rank, alpha, dora=dora, rslora=i % 2 == 1) for i, (rank, alpha, _, _) in enumerate(points)]
    # with Adam's usual eps, a gradient that is zero but for rounding would move a float32 weight as much as any other
    optimizers = [chain(lr, weight_decay=0.1, eps=1e-8 if wide else 1e-3) for _, _, lr, _ in points]
    seeds = [seed for *_, seed in points]
    found, _, told = swept(model, params, rules, optimizers, seeds, data, micro)
    for i, (own, optimizer, seed) in enumerate(zip(rules, optimizers, seeds, strict=True)):
        mine = [Batch(*(x[i] for x in batch)) for batch in data]
        wanted, _, metrics = alone(model, params, own, optimizer, seed, mine, micro)
        assert_close(sweep.adapter(found, i, own), wanted, 1e-10 if wide else 1e-6)
        for ours, theirs in zip(told, metrics, strict=True):
            assert_close({name: x[i] for name, x in ours.items()}, theirs, 1e-9 if wide else 1e-5)
        pad = tree.map(lambda x, i=i: x[i].clone(), found)
        for name, delta in pad.items():
            rank = own.rank_of(name)
            assert not delta.a[rank:].any()
            assert not delta.b[:, rank:].any()
