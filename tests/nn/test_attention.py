"""Attention equals plain sums on every way that it can take, with values wider or narrower than queries and keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from minitune import tree
from minitune.nn.attention import blockwise
from minitune.nn.attention.attention import attention
from minitune.nn.attention.key_range import KeyRange, document_keys
from support.attention import plain

pytestmark = pytest.mark.fast


def normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(y: torch.Tensor, leaves: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_last_queries_over_a_cache_equal_plain_sums(data: st.DataObject, seed: int) -> None:
    """Fewer queries than keys, as in decoding: torch's fused kernel with a mask, or whole scores for a cap or sinks."""
    generator = torch.Generator().manual_seed(seed)
    b, n_kv, groups, e, e_v, n_new, n_past = (data.draw(st.integers(1, n)) for n in (3, 3, 3, 5, 7, 5, 9))
    n_keys = n_past + n_new
    last = torch.arange(n_past, n_keys)[None]
    key_range = KeyRange(torch.randint(0, n_past + 1, (b, 1), generator=generator).expand(-1, n_new), last)
    cap = data.draw(st.sampled_from([None, 0.9]))
    sinks = normal(n_kv * groups, generator=generator) if data.draw(st.booleans()) else None
    q = normal(b, n_kv * groups, n_new, e, generator=generator)
    k, v = (normal(b, n_kv, n_keys, width, generator=generator) for width in (e, e_v))
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    y = attention(q, k, v, key_range, scale=0.37, soft_cap=cap, sinks=sinks)
    assert y.shape == (b, n_kv * groups, n_new, e_v)
    wanted = plain(q, k, v, key_range, 0.37, cap, sinks)
    for a, c in zip(gradients(y, leaves, 0), gradients(wanted, leaves, 0), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("cap", [None, 0.9])
@pytest.mark.parametrize(("e", "e_v"), [(3, 5), (5, 2)])
def test_under_vmap_it_equals_itself_example_by_example(cap: float | None, e: int, e_v: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 1, n, 7, width, generator=generator) for n, width in ((6, e), (2, e), (2, e_v)))
    key_range = document_keys(torch.tensor([[1, 1, 1, 2, 2, 3, 0]]))
    ours = torch.func.vmap(lambda q, k, v: attention(q, k, v, key_range, soft_cap=cap))(q, k, v)
    each = [attention(q[i], k[i], v[i], key_range, soft_cap=cap) for i in range(4)]
    torch.testing.assert_close(ours, torch.stack(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_operator_of_blocks_makes_without_values_what_it_makes_with_them(dtype: torch.dtype, has_sinks: bool) -> None:
    """Shapes, dtypes and strides, which a compiled block and a plan of the memory both read, of results and gradients."""

    def made() -> list[tuple]:
        q, k, v = (torch.zeros(2, n, 9, width, dtype=dtype) for n, width in ((6, 3), (2, 3), (2, 5)))
        sinks = torch.zeros(6, dtype=dtype) if has_sinks else None
        y, tops = blockwise._attend(q, k, v, None, sinks, 0.5, None)  # pyright: ignore[reportPrivateUsage]
        grads = blockwise._attend_backward(y, q, k, v, None, sinks, tops, 0.5, None)  # pyright: ignore[reportPrivateUsage]
        return [(x.shape, x.dtype, x.stride()) for x in tree.leaves((y, tops, grads))]

    with FakeTensorMode():
        fake = made()
    assert fake == made()
