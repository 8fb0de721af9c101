"""Attention by blocks of queries equals plain sums in float64, values and gradients, whatever the documents and windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune import blockwise
from minitune.attention import attention, document_mask


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return (scale * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_blocks_equal_plain_sums_with_their_gradients(data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, n_kv, groups, e = (data.draw(st.integers(1, 3)) for _ in range(4))
    length, block, window = (data.draw(st.integers(1, n)) for n in (40, 9, 40))
    segments = 1 + (torch.rand(b, length, generator=generator) < 0.3).cumsum(1)
    real = torch.randint(1, length + 1, (b, 1), generator=generator)
    mask = document_mask(torch.where(torch.arange(length) < real, segments, 0))
    ages = torch.arange(length)[:, None] - torch.arange(length)
    mask = mask & (ages < window)
    heads = (n_kv * groups, n_kv, n_kv)
    q, k, v = (torch.randn(b, n, length, e, generator=generator, dtype=torch.float64).requires_grad_() for n in heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", block)
        patch.setattr(blockwise, "DENSE", 1.1)
        found = blockwise.runs(mask, b)
        assert found is not None
        out = blockwise.attend(q, k, v, *found, 0.37)
        wanted = plain(q, k, v, mask, 0.37)
        torch.testing.assert_close(out, wanted)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        for a, c in zip(*(torch.autograd.grad(x, (q, k, v), cotangent) for x in (out, wanted)), strict=True):
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_go_through_blocks_and_whole_rows_do_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 300, 8, generator=generator).to(dtype) for n in (4, 2, 2))
    called = []
    attend = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *args: called.append(len(args)) or attend(*args))
    for n_documents, expected in ((1, 0), (7, 1)):
        mask = document_mask((torch.arange(300) * n_documents // 300 + 1).expand(2, -1))
        found = attention(q, k, v, mask)
        assert len(called) == expected
        wanted = plain(q.double(), k.double(), v.double(), mask, 8**-0.5)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_mask_with_a_gap_is_left_to_the_fused_kernel() -> None:
    mask = document_mask((torch.arange(300) * 7 // 300 + 1)[None])
    assert blockwise.runs(mask, 3) is not None
    mask[0, 0, 200, 190] = False
    assert blockwise.runs(mask, 3) is None
    blind = document_mask((torch.arange(300) * 7 // 300 + 1)[None])
    blind[0, 0, 299] = False
    assert blockwise.runs(blind, 3) is None


def test_a_gradient_of_its_gradient_is_refused_rather_than_wrong() -> None:
    mask = document_mask((torch.arange(300) * 7 // 300 + 1)[None])
    q, k, v = (torch.randn(1, 2, 300, 4, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attention(q, k, v, mask).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
