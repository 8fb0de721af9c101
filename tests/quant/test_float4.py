"""4-bit floats: nearest codes, scales that lose least, and the values that other packages read."""

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitune.quant import float4, mxfp4
from minitune.quant.schemes import MXFP4, NVFP4, dequantize, quantize
from minitune.quant.tensors import QMXFP4, QNVFP4

LEVELS = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6.0])


def drawn(seed: int, rows: int, groups: int, size: float, spread: float) -> Tensor:
    """Weights whose groups are of different sizes, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups, 32, generator=generator)
    sizes = torch.exp(spread * torch.randn(rows, groups, 1, generator=generator))
    kinds = torch.rand(rows, groups, 1, generator=generator)
    return (torch.where(kinds < 0.1, 0.0, w * sizes) * size).flatten(1)


def scales(q: QMXFP4 | QNVFP4) -> Tensor:
    """Scale of every weight."""
    if isinstance(q, QMXFP4):
        groups = 2.0 ** (q.scale.double() - 127)
    else:
        groups = q.scale.double() / q.divisor.double()
    return groups.repeat_interleave(q.shape[1] // groups.shape[1], 1)


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.sampled_from([1.0, 0.02, 1e-20, 1e20]),
    spread=st.floats(0, 3),
)
def test_codes_are_the_nearest_and_few_numbers_are_clipped(seed: int, rows: int, groups: int, size: float, spread: float) -> None:
    w = drawn(seed, rows, groups, size, spread)
    for scheme in (MXFP4(), NVFP4()):
        q = quantize(w, scheme)
        assert isinstance(q, QMXFP4 | QNVFP4)
        scale = scales(q)
        values = unpack_fp4_from_uint8(q.codes, *w.shape, dtype=torch.float64) * scale
        assert torch.equal(dequantize(q, torch.float32), values.float())
        every = (LEVELS.double() * scale[..., None] - w[..., None]).abs().amin(-1)
        torch.testing.assert_close((values - w).abs(), every, rtol=1e-6, atol=1e-7 * size)
        # of the largest number a quarter is lost at most, by clipping it to 6 of 8 or below; of a
        # group so small that its scale has a few bits or none, more
        peak = w.abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
        floor = w.abs().amax() / 448 / 64 if isinstance(q, QNVFP4) else 0.0
        assert bool(((values - w).abs() <= 0.26 * peak + floor).all())


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    w = torch.cat([ties, -ties]).repeat(2)[None]
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    wanted = torch.cat([even, -even]).repeat(2)[None]
    q = quantize(w, MXFP4())
    assert isinstance(q, QMXFP4)
    assert torch.equal(dequantize(q, torch.float32), wanted)
    assert 8 not in {*(q.codes & 15).flatten().tolist(), *(q.codes >> 4).flatten().tolist()}  # a zero has no sign


def test_mxfp4_is_that_of_gpt_oss() -> None:
    w = drawn(0, 6, 3, 0.02, 2.0)
    q = quantize(w, MXFP4())
    assert isinstance(q, QMXFP4)
    by_expert = mxfp4.dequantize(q.codes.view(1, 6, 3, 16), q.scale[None], torch.float32)
    assert torch.equal(by_expert[0].T, dequantize(q, torch.float32))


@pytest.mark.parametrize(("kind", "share"), [("mxfp4", 0.9), ("nvfp4", 0.93)])
def test_the_choice_of_scales_pays(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared error beside that of the largest number at the top."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    make = {"mxfp4": float4.mxfp4, "nvfp4": float4.nvfp4}[kind]
    chosen = (dequantize(make(w), torch.float32) - w).square().sum()
    # of MXFP4 the second choice is that by which no number is clipped
    first = (lambda groups, s: torch.zeros_like(s[0], dtype=torch.int64)[None]) if kind == "nvfp4" else None
    last = lambda groups, s: torch.ones_like(s[0], dtype=torch.int64)[None]  # noqa: E731
    monkeypatch.setattr(float4, "_best", first or last)
    plain = (dequantize(make(w), torch.float32) - w).square().sum()
    assert chosen < share * plain


def test_the_divisor_is_a_power_of_two_that_uses_the_range_of_the_scales() -> None:
    for size in (1e-9, 0.02, 1.0, 5e4):
        q = quantize(drawn(1, 5, 4, size, 1.0), NVFP4())
        assert isinstance(q, QNVFP4)
        assert torch.frexp(q.divisor).mantissa == 0.5
        assert 224 / 1.1 <= float(q.scale.float().amax()) <= 448
