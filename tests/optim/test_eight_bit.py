"""Moments in 8 bits, equal to those of bitsandbytes, and what they cost."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given
from hypothesis import strategies as st

from minitune import tree
from minitune.optim import eight_bit
from minitune.optim.adamw import AdamW

SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    torch.testing.assert_close(eight_bit.dynamic_table(signed), create_dynamic_map(signed, 7, 8), rtol=1e-6, atol=1e-7)


@given(seed=SEEDS, n=st.integers(1, 700), scale=st.floats(1e-6, 1e6), signed=st.booleans())
def test_a_code_is_the_nearest_of_the_table_and_zeros_stay_zero(seed: int, n: int, scale: float, signed: bool) -> None:
    x = scale * torch.randn(n, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x if signed else x.abs()
    q = eight_bit.quantize(x, signed)
    assert (q.codes.shape, q.codes.dtype) == ((-(-n // 256), 256), torch.uint8)
    back, table = eight_bit.dequantize(q, signed, x), eight_bit.dynamic_table(signed)[0 if signed else 1 :]
    for start in range(0, n, 256):
        block = x[start : start + 256]
        nearest = (block[:, None] - table * block.abs().max()).abs().amin(1)
        torch.testing.assert_close((back[start : start + 256] - block).abs(), nearest, rtol=1e-3, atol=1e-6 * scale)
    zeros = torch.zeros(n)
    assert torch.equal(eight_bit.dequantize(eight_bit.quantize(zeros, signed), signed, zeros), zeros)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_8_bit_adamw_takes_the_steps_of_bitsandbytes(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, 129, generator=generator)
    theirs = torch.nn.Parameter(p.clone())
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=decay, min_8bit_size=4096)
    rules = [kind(lr=1e-2, weight_decay=decay) for kind in (eight_bit.AdamW8bit, AdamW)]
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
    params, rule = {"w": torch.zeros(64, 128)}, eight_bit.AdamW8bit(lr=1.0)
    state = rule.init(params)
    for _ in range(4):
        grads = {"w": torch.randn(64, 128, generator=generator) * torch.logspace(-6, 0, 128)}
        updates, state = rule.update(grads, state, params)
        assert float(updates["w"].abs().max()) < 4.0


def test_8_bit_moments_take_a_quarter_of_the_memory_and_small_leaves_stay_exact() -> None:
    params = {"large": torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), "small": torch.ones(5)}
    whole, short = (kind(lr=1e-2).init(params) for kind in (AdamW, eight_bit.AdamW8bit))
    assert tree.n_bytes(short) < 0.26 * tree.n_bytes(whole)
    grads = {"large": params["large"], "small": torch.arange(5.0)}
    updates, wanted = (
        kind(lr=1e-2).update(grads, kind(lr=1e-2).init(params), params)[0] for kind in (eight_bit.AdamW8bit, AdamW)
    )
    torch.testing.assert_close(updates["small"], wanted["small"], rtol=0, atol=0)


def test_moments_begin_as_zeros_that_were_quantized() -> None:
    for shape in ((4096,), (61, 97), (3, 5, 1031)):
        x = torch.zeros(shape)
        state = eight_bit.AdamW8bit(lr=0.1).init({"w": x})
        for moments, signed in ((state.mu, True), (state.nu, False)):
            for found, expected in zip(moments[0], eight_bit.quantize(x, signed), strict=True):
                assert found.dtype == expected.dtype
                assert found.equal(expected)
