"""Rounding at random is unbiased, keeps small steps, and draws its own number for every element, step, leaf and seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import hardware
from minitune.optim import rounding
from minitune.optim.apply import apply_gradients
from minitune.optim.rounding import draw_16_bits, step_keys
from minitune.optim.sgd import SGD
from minitune.optim.transforms import chain

SEEDS = st.integers(0, 2**32)


@settings(max_examples=10)
@pytest.mark.parametrize("selects", [False, True], ids=["drawn", "hashed"])
@given(value=st.floats(-(2.0**90), 2.0**90, width=32).filter(lambda x: abs(x) > 1e-30), seed=SEEDS)
def test_stochastic_rounding_is_unbiased_and_gives_a_neighbour(selects: bool, value: float, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "is_asynchronous", lambda device: selects)
        check_rounding(value, seed)


def check_rounding(value: float, seed: int) -> None:
    x = torch.full((20000,), value)
    rounded = rounding.RoundStochastically(seed).rounding_after(torch.tensor(3))(x, "w", 0).double()
    low = torch.tensor(value).view(torch.int32) & -(2**16)
    ends = torch.stack([low, low + 2**16]).view(torch.float32).double()
    assert set(rounded.unique().tolist()) <= set(ends.tolist())
    gap = float((ends[1] - ends[0]).abs())
    assert float(rounded.mean() - x.double().mean()) == pytest.approx(0.0, abs=5 * 0.5 * gap / 20000**0.5)
    exact = torch.tensor([value, torch.inf, -torch.inf, torch.nan]).bfloat16().float()
    kept = rounding.RoundStochastically(seed).rounding_after(torch.tensor(3))(exact, "w", 0).float()
    torch.testing.assert_close(kept, exact, rtol=0, atol=0, equal_nan=True)


def test_small_steps_add_up_under_stochastic_rounding_and_are_lost_without() -> None:
    start, grads = {"w": torch.full((4000,), 1.0, dtype=torch.bfloat16)}, {"w": torch.ones(4000, dtype=torch.bfloat16)}
    ends = {}
    for name, optimizer in {
        "nearest": SGD(lr=1e-4),
        "random": chain(SGD(lr=1e-4), rounding.RoundStochastically(3)),
    }.items():
        params, state, one = start, optimizer.init(start), torch.tensor(1.0)
        for _ in range(50):
            params, state = apply_gradients(
                optimizer, grads, state, params, divisor=one, norm=one, is_finite=one > 0, donate=False
            )
        assert params["w"].dtype == torch.bfloat16
        ends[name] = float(params["w"].float().mean())
    assert ends["nearest"] == 1.0
    assert ends["random"] == pytest.approx(1 - 50e-4, abs=2e-4)


@given(seed=SEEDS, cut=st.integers(0, 1001), step=st.integers(0, 2**40))
def test_a_hashed_draw_belongs_to_its_element_whatever_slice_is_drawn(seed: int, cut: int, step: int) -> None:
    keys = step_keys(seed, torch.tensor(step))
    whole = draw_16_bits(keys, 5, 0, 1001)
    parts = [draw_16_bits(keys, 5, 0, cut), draw_16_bits(keys, 5, cut, 1001 - cut)]
    assert torch.equal(whole, torch.cat(parts))


def test_hashed_draws_are_uniform_and_those_of_other_steps_leaves_seeds_and_places_are_unrelated() -> None:
    n = 2**18

    def drawn(seed: int, step: int, leaf_key: int) -> torch.Tensor:
        return draw_16_bits(step_keys(seed, torch.tensor(step)), leaf_key, 0, n).double()

    x = drawn(0, 3, 11)
    counts = torch.bincount((x / 256).long(), minlength=256)
    assert counts.numel() == 256
    chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
    others = [drawn(0, 4, 11), drawn(0, 3, 12), drawn(1, 3, 11), *(x.roll(k) for k in (1, 2, 3, 64))]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([x, other]))[0, 1])) < 5 / n**0.5
