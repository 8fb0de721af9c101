"""Attention by blocks of queries equals plain sums in float64, with gradients, whatever the documents, windows, caps, sinks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune.nn.attention import blockwise, span_layout
from minitune.nn.attention.attention import attention
from minitune.nn.attention.key_range import causal, document_keys, windowed
from support.attention import plain

pytestmark = pytest.mark.fast


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_blocks_equal_plain_sums_with_their_gradients(data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, n_kv, groups, e, e_v = (data.draw(st.integers(1, n)) for n in (3, 3, 3, 3, 5))
    length, block, window = (data.draw(st.integers(1, n)) for n in (40, 9, 40))
    rows = data.draw(st.sampled_from([1, b]))  # places of one row stand for all
    segments = 1 + (torch.rand(rows, length, generator=generator) < data.draw(st.sampled_from([0.0, 0.3]))).cumsum(1)
    real = torch.randint(1, length + 1, (rows, 1), generator=generator)
    key_range = data.draw(
        st.sampled_from(
            [
                windowed(document_keys(torch.where(torch.arange(length) < real, segments, 0)), window),
                document_keys(segments),
                causal(length, torch.device("cpu")),
            ]
        )
    )
    cap = data.draw(st.sampled_from([None, 0.9]))
    sizes = ((n_kv * groups, e), (n_kv, e), (n_kv, e_v))
    q, k, v = (torch.randn(b, n, length, width, generator=generator, dtype=torch.float64).requires_grad_() for n, width in sizes)
    sinks = (
        torch.randn(n_kv * groups, generator=generator, dtype=torch.float64).requires_grad_()
        if data.draw(st.booleans())
        else None
    )
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 8 * block)
        patch.setattr(span_layout, "PADDED", data.draw(st.sampled_from([1.0, 1.5, 1e9])))
        out = attention(q, k, v, key_range, scale=0.37, soft_cap=cap, sinks=sinks)
        wanted = plain(q, k, v, key_range, 0.37, cap, sinks)
        torch.testing.assert_close(out, wanted)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        for a, c in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize(("n_documents", "size"), [(1, 1.0), (7, 1.0), (1, 4.0)])
def test_bfloat16_is_as_near_to_the_truth_as_the_fused_kernel(n_documents: int, size: float) -> None:
    """Sizes that make scores of up to 300 too, whose rounding to bfloat16 would turn every weight into another."""
    generator = torch.Generator().manual_seed(n_documents)
    exact = [
        (scale * torch.randn(2, n, 300, 16, generator=generator, dtype=torch.float64)).bfloat16().double().requires_grad_()
        for n, scale in ((4, size), (2, size), (2, 1.0))
    ]
    given = [x.detach().bfloat16().requires_grad_() for x in exact]
    cotangent = torch.randn(2, 4, 300, 16, generator=generator, dtype=torch.float64)
    key_range = document_keys((torch.arange(300) * n_documents // 300 + 1).expand(2, -1))
    wanted = plain(*exact, key_range, 0.25, None, None)
    ours = attention(*given, key_range, scale=0.25)
    fused = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=key_range.mask(300), scale=0.25, enable_gqa=True)
    truth, mine, theirs = (
        [y, *torch.autograd.grad(y, x, cotangent.to(y.dtype))] for y, x in ((wanted, exact), (ours, given), (fused, given))
    )
    for t, a, f in zip(truth, mine, theirs, strict=True):
        off, fused_off = (torch.linalg.vector_norm(x.double() - t) / torch.linalg.vector_norm(t) for x in (a, f))
        assert off < 1.5 * fused_off


def test_no_query_meets_a_key_of_another_document() -> None:
    segments = (torch.arange(300) * 7 // 300 + 1)[None]
    first = document_keys(segments).starts()
    plan = span_layout.layout(first.numpy(), 64)
    assert sum(b.n_spans * (b.end - b.start) * (b.end - b.lowest) for b in plan.blocks) <= 7 * 43 * 43
    q, k, v = (torch.randn(1, 2, 300, 4) for _ in range(3))
    start = int(first[0, 128])  # where the document of token 128 begins
    assert start > 42
    out, poisoned = (
        attention(q, keys, v, document_keys(segments)) for keys in (k, k.index_fill(2, torch.arange(start), torch.nan))
    )
    assert torch.equal(out[:, :, start:], poisoned[:, :, start:])


def test_a_window_leaves_out_the_keys_before_it() -> None:
    key_range = windowed(causal(300, torch.device("cpu")), 30)
    plan = span_layout.layout(key_range.starts().numpy(), 64)
    assert [b.lowest for b in plan.blocks] == [0, 35, 99, 163, 227]


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), size=st.integers(1, 70))
def test_every_token_has_one_slot_and_padding_is_bounded(lengths: list[int], size: int) -> None:
    begins = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    first = begins.repeat_interleave(torch.tensor(lengths))[None]
    plan = span_layout.layout(first.numpy(), size)
    for table in (plan.queries, plan.keys):
        tokens = torch.cat([torch.from_numpy(box[real]) for box, real in zip(table.tokens, table.filled, strict=True)])
        assert torch.equal(tokens.sort().values, torch.arange(sum(lengths)))
    assert sum(box.size for box in plan.keys.tokens) <= span_layout.PADDED * sum(lengths)
    assert sum(box.size for box in plan.queries.tokens) <= span_layout.PADDED * sum(lengths)
    x = torch.randn(1, 3, sum(lengths), 2)
    for table in (plan.queries, plan.keys):
        assert torch.equal(table.scattered(table.gathered(x), x.shape), x)


def test_a_gradient_of_its_gradient_is_refused_rather_than_wrong() -> None:
    key_range = document_keys((torch.arange(300) * 7 // 300 + 1)[None])
    q, k, v = (torch.randn(1, 2, 300, 4, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attention(q, k, v, key_range).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
