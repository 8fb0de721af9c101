"""One step of an optimizer is its update, however it is computed; fewer bits for moments and parameters, and what they cost."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given, settings
from hypothesis import strategies as st
from minitune.advance import advance
from models_for_tests import SMALL, random_batch, random_params

from minitune import advance as advance_module
from minitune import optim, optim8, tree
from minitune.models import Model, llama
from minitune.objectives import sft
from minitune.steps import train_step
from minitune.types import Delta
from support.models import SMALL, random_batch, random_params

SEEDS = st.integers(0, 2**32)


def random_tree(seed: int, dtype: torch.dtype = torch.float32) -> tree.Tree:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 5), "norm.weight": (7,), "scalar": ()}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    return {**found, "d": Delta(*(torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in "ab"))}


def chains(lr: float, clip: float, factor: float, weight_decay: float) -> dict[str, object]:
    adam, schedule = optim.AdamW(lr=lr, weight_decay=weight_decay), optim.ScaleBySchedule(optim.Cosine(2, end=0.1), 9)
    parts = optim.ClipByGlobalNorm(clip), adam, optim.ScaleByGlob({"*.b": factor}), schedule
    return {"bare": adam, "chained": optim.chain(*parts), "twice clipped": optim.chain(optim.ClipByGlobalNorm(2 * clip), *parts)}


def taken(optimizer: object, n: int, divisor: float, by_update: bool, donate: bool, dtype: torch.dtype) -> tree.Tree:
    """(params, state) after n steps, by `advance` or by its definition."""
    params = random_tree(0, dtype)
    state = optimizer.init(params)
    for i in range(n):
        grads = random_tree(i + 1, dtype)
        mean = tree.map(lambda g: g / divisor, grads)
        if by_update:
            updates, state = optimizer.update(mean, state, params)
            params = tree.add(params, updates)
        else:
            places = [x.data_ptr() for x in tree.leaves((params, state))]
            by = torch.tensor(divisor, dtype=dtype)
            params, state = advance(
                optimizer, grads, state, params, divisor=by, norm=tree.norm(mean), sound=torch.tensor(True), donate=donate
            )
            assert (places == [x.data_ptr() for x in tree.leaves((params, state))]) == donate
    return params, state


@settings(max_examples=10)
@given(
    lr=st.floats(1e-4, 0.1), clip=st.floats(0.1, 9), factor=st.floats(0, 9), decay=st.floats(0, 0.5), divisor=st.floats(0.5, 99),
    wide=st.booleans(), donate=st.booleans(),
)  # fmt: skip
def test_a_fused_step_is_the_update_that_is_added(
    lr: float, clip: float, factor: float, decay: float, divisor: float, wide: bool, donate: bool
) -> None:
    dtype = torch.float64 if wide else torch.float32
    for optimizer in chains(lr, clip, factor, decay).values():
        found, wanted = (taken(optimizer, 5, divisor, by_update, donate, dtype) for by_update in (False, True))
        # torch's kernel takes the learning rate in float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [4, 2**20])
def test_bfloat16_weights_take_the_step_of_their_float32_copies_and_are_rounded_once(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of a leaf the kernel is given at a time."""
    monkeypatch.setattr(advance_module, "FUSED_ELEMENTS", {"cpu": limit})
    optimizer = chains(0.01, 0.5, 3.0, 0.1)["chained"]
    params = random_tree(0, torch.bfloat16)
    copies, state, one = tree.map(torch.Tensor.float, params), optimizer.init(params), torch.tensor(1.0)
    theirs = optimizer.init(copies)
    assert {x.dtype for x in tree.leaves(state[1].mu)} == {torch.float32}
    for i in range(3):
        grads = random_tree(i + 1, torch.bfloat16)
        same = {"divisor": torch.tensor(7.0), "norm": tree.norm(grads) / 7, "sound": one > 0, "donate": True}
        copies, theirs = advance(optimizer, tree.map(torch.Tensor.float, grads), theirs, copies, **same)
        copies = tree.map(lambda x: x.bfloat16().float(), copies)
        params, state = advance(optimizer, grads, state, params, **same)
        torch.testing.assert_close(tree.map(torch.Tensor.float, params), copies, rtol=0, atol=0)
        torch.testing.assert_close(state, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bare", "chained", "twice clipped"])
def test_donated_and_pure_steps_are_the_same_to_the_last_bit(name: str) -> None:
    optimizer = chains(0.01, 0.5, 3.0, 0.1)[name]
    found, wanted = (taken(optimizer, 4, 3.0, False, donate, torch.float32) for donate in (True, False))
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), found, wanted)


@pytest.mark.parametrize("optimizer", [optim.AdamW(lr=0.1), optim.SGD(lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_sound_changes_nothing(optimizer: object, donate: bool) -> None:
    params, broken = random_tree(0), tree.map(lambda x: x * torch.nan, random_tree(1))
    state = optimizer.init(params)
    given_ = tree.map(torch.clone, (params, state))
    one = torch.tensor(1.0)
    new = advance(optimizer, broken, state, params, divisor=one, norm=one, sound=torch.tensor(False), donate=donate)
    torch.testing.assert_close(new, given_, rtol=0, atol=0)


def test_gradients_that_share_memory_are_each_their_own() -> None:
    grad, optimizer = torch.full((3, 4), 2.0), optim.chain(optim.ClipByGlobalNorm(0.1), optim.AdamW(lr=0.1))
    params = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4), "c": torch.zeros(4, 3)}
    grads = {"a": grad, "b": grad, "c": torch.tensor(2.0).expand(4, 3)}
    one = torch.tensor(1.0)
    new, state = advance(
        optimizer, grads, optimizer.init(params), params, divisor=one, norm=tree.norm(grads), sound=one > 0, donate=True
    )
    torch.testing.assert_close(torch.cat([x.flatten() for x in new.values()]), torch.full((36,), -0.1))
    torch.testing.assert_close(state[1].mu["b"], torch.full((3, 4), 0.1 * 2 * 0.1 / 12), rtol=1e-4, atol=0)
    assert torch.equal(grad, torch.full((3, 4), 2.0))


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    torch.testing.assert_close(optim8.dynamic_table(signed), create_dynamic_map(signed, 7, 8), rtol=1e-6, atol=1e-7)


@given(seed=SEEDS, n=st.integers(1, 700), scale=st.floats(1e-6, 1e6), signed=st.booleans())
def test_a_code_is_the_nearest_of_the_table_and_zeros_stay_zero(seed: int, n: int, scale: float, signed: bool) -> None:
    x = scale * torch.randn(n, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x if signed else x.abs()
    q = optim8.quantize(x, signed)
    assert (q.codes.shape, q.codes.dtype) == ((-(-n // 256), 256), torch.uint8)
    back, table = optim8.dequantize(q, signed, x), optim8.dynamic_table(signed)[0 if signed else 1 :]
    for start in range(0, n, 256):
        block = x[start : start + 256]
        nearest = (block[:, None] - table * block.abs().max()).abs().amin(1)
        torch.testing.assert_close((back[start : start + 256] - block).abs(), nearest, rtol=1e-3, atol=1e-6 * scale)
    zeros = torch.zeros(n)
    assert torch.equal(optim8.dequantize(optim8.quantize(zeros, signed), signed, zeros), zeros)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_8_bit_adamw_takes_the_steps_of_bitsandbytes(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, 129, generator=generator)
    theirs = torch.nn.Parameter(p.clone())
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=decay, min_8bit_size=4096)
    rules = [kind(lr=1e-2, weight_decay=decay) for kind in (optim.AdamW8bit, optim.AdamW)]
    states, params = [rule.init({"w": p}) for rule in rules], [{"w": p}, {"w": p}]
    for _ in range(6):
        grad = {"w": torch.randn(64, 129, generator=generator)}
        theirs.grad = grad["w"].clone()
        reference.step()
        steps = [rule.update(grad, state, w) for rule, state, w in zip(rules, states, params, strict=True)]
        states, params = [state for _, state in steps], [tree.add(w, u) for w, (u, _) in zip(params, steps, strict=True)]
    short, whole = (float((w["w"] - theirs.detach()).norm() / (theirs.detach() - p).norm()) for w in params)
    assert short < 5e-3  # not 0: on a CPU bitsandbytes looks its codes up in a table too coarse for the smallest
    assert whole > 2 * short


def test_a_gradient_that_is_tiny_in_its_block_takes_no_giant_step() -> None:
    generator = torch.Generator().manual_seed(0)
    params, rule = {"w": torch.zeros(64, 128)}, optim.AdamW8bit(lr=1.0)
    state = rule.init(params)
    for _ in range(4):
        grads = {"w": torch.randn(64, 128, generator=generator) * torch.logspace(-6, 0, 128)}
        updates, state = rule.update(grads, state, params)
        assert float(updates["w"].abs().max()) < 4.0


def test_8_bit_moments_take_a_quarter_of_the_memory_and_small_leaves_stay_exact() -> None:
    params = {"large": torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), "small": torch.ones(5)}
    whole, short = (kind(lr=1e-2).init(params) for kind in (optim.AdamW, optim.AdamW8bit))
    assert tree.n_bytes(short) < 0.26 * tree.n_bytes(whole)
    grads = {"large": params["large"], "small": torch.arange(5.0)}
    found, wanted = (
        kind(lr=1e-2).update(grads, kind(lr=1e-2).init(params), params)[0] for kind in (optim.AdamW8bit, optim.AdamW)
    )
    torch.testing.assert_close(found["small"], wanted["small"], rtol=0, atol=0)


# bfloat16


@settings(max_examples=10)
@given(value=st.floats(-(2.0**90), 2.0**90, width=32).filter(lambda x: abs(x) > 1e-30), seed=SEEDS)
def test_stochastic_rounding_is_unbiased_and_gives_a_neighbour(value: float, seed: int) -> None:
    x = torch.full((20000,), value)
    found = optim8.stochastic_bfloat16(x, torch.Generator().manual_seed(seed)).double()
    low = torch.tensor(value).view(torch.int32) & -(2**16)
    ends = torch.stack([low, low + 2**16]).view(torch.float32).double()
    assert set(found.unique().tolist()) <= set(ends.tolist())
    gap = float((ends[1] - ends[0]).abs())
    assert float(found.mean() - x.double().mean()) == pytest.approx(0.0, abs=5 * 0.5 * gap / 20000**0.5)
    exact = torch.tensor([value, torch.inf, -torch.inf, torch.nan]).bfloat16().float()
    again = optim8.stochastic_bfloat16(exact, torch.Generator().manual_seed(seed)).float()
    torch.testing.assert_close(again, exact, rtol=0, atol=0, equal_nan=True)


def test_small_steps_add_up_under_stochastic_rounding_and_are_lost_without() -> None:
    start, grads = {"w": torch.full((4000,), 1.0, dtype=torch.bfloat16)}, {"w": torch.ones(4000, dtype=torch.bfloat16)}
    ends = {}
    for name, optimizer in {
        "nearest": optim.SGD(lr=1e-4),
        "random": optim.chain(optim.SGD(lr=1e-4), optim.RoundStochastically(3)),
    }.items():
        params, state, one = start, optimizer.init(start), torch.tensor(1.0)
        for _ in range(50):
            params, state = advance(optimizer, grads, state, params, divisor=one, norm=one, sound=one > 0, donate=False)
        assert params["w"].dtype == torch.bfloat16
        ends[name] = float(params["w"].float().mean())
    assert ends["nearest"] == 1.0
    assert ends["random"] == pytest.approx(1 - 50e-4, abs=2e-4)


OPTIONS = {
    "adamw": (optim.AdamW(lr=1e-2), torch.float32),
    "8-bit moments": (optim.AdamW8bit(lr=1e-2), torch.float32),
    "bfloat16 parameters": (optim.chain(optim.AdamW(lr=1e-2), optim.RoundStochastically(0)), torch.bfloat16),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("donate", [False, True])
def test_every_option_trains_a_model_and_donation_changes_nothing_but_where_it_lies(name: str, donate: bool) -> None:
    optimizer, dtype = OPTIONS[name]
    model, params, batch = Model(llama.FAMILY, SMALL), random_params(SMALL), random_batch(SMALL, 2, 13)
    trainable = {path: w.to(dtype, copy=True) for path, w in params.items()}
    state, losses = optimizer.init(trainable), []
    step = train_step(sft(model, None), optimizer, micro_batch=1, donate=donate)
    pure = train_step(sft(model, None), optimizer, micro_batch=1)
    for _ in range(6):
        wanted = pure(params, trainable, state, batch)
        trainable, state, metrics = step(params, trainable, state, batch)
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), (trainable, state), wanted[:2])
        losses.append(float(metrics["loss_nats"]))
    assert losses[-1] < 0.9 * losses[0]
