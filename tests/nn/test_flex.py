"""Attention through flex_attention: its values and gradients, its blocks of keys, its graphs.

Its kernels need CUDA. On the CPU torch runs what they are written after, with whole scores; it refuses gradients there only
because it has no kernel for them, so these tests lift that refusal.
"""

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from minitune.nn.attention import flex
from support.attention import plain, runs
from support.scripts import run_script

CPU = torch.device("cpu")
SEEN = ("causal", "documents", "windows", "chunks", "padding")


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """flex_attention's reference at once, with gradients on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_validate_device", lambda *_: None)
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@given(data=st.data(), kind=st.sampled_from(SEEN), seed=st.integers(0, 2**32))
def test_it_equals_plain_sums_with_its_gradients(data: st.DataObject, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, n_kv, groups, e, e_v = (data.draw(st.integers(1, n)) for n in (3, 3, 3, 3, 5))
    length, reach = (data.draw(st.integers(1, n)) for n in (40, 12))
    key_range = runs(kind, b, length, reach, data.draw(st.sampled_from([0.0, 0.1, 0.4])), generator)
    cap = data.draw(st.sampled_from([None, 0.9]))
    sizes = ((n_kv * groups, e), (n_kv, e), (n_kv, e_v))
    q, k, v = (torch.randn(b, n, length, width, generator=generator, dtype=torch.float64).requires_grad_() for n, width in sizes)
    sinks = (
        torch.randn(n_kv * groups, generator=generator, dtype=torch.float64).requires_grad_()
        if data.draw(st.booleans())
        else None
    )
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    first = key_range.first if isinstance(key_range.first, torch.Tensor) else None
    out = flex.attend(q, k, v, first, sinks, scale=0.37, soft_cap=cap)
    wanted = plain(q, k, v, key_range, 0.37, cap, sinks)
    torch.testing.assert_close(out, wanted)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for a, c in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(a, c)


@settings(max_examples=100)
@given(
    kind=st.sampled_from(SEEN),
    length=st.integers(1, 61),
    block=st.integers(2, 9),
    reach=st.integers(1, 30),
    share=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_its_blocks_are_those_of_the_whole_mask(kind: str, length: int, block: int, reach: int, share: float, seed: int) -> None:
    """Those that torch finds by looking at every place: needed ones and those seen whole, by queries and by keys."""
    key_range = runs(kind, 2, length, reach, share, torch.Generator().manual_seed(seed))
    first = key_range.first if isinstance(key_range.first, torch.Tensor) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", block)
        blocks = flex.block_mask(first, length, CPU)
    rows = len(key_range.starts())
    mask = key_range.mask(length)
    wanted = torch_flex.create_block_mask(
        lambda b, h, q, k: mask[b, 0, q, k], rows, None, length, length, "cpu", BLOCK_SIZE=block
    )
    places = torch.arange(length)
    here = (torch.arange(rows)[:, None, None], torch.zeros(()), places[:, None], places)
    assert torch.equal(blocks.mask_mod(*here).expand(mask[:, 0].shape), mask[:, 0])
    assert (blocks.shape, blocks.BLOCK_SIZE) == ((rows, 1, length, length), (block, block))
    for which in ("kv", "full_kv", "q", "full_q"):
        ours, theirs = (listed(m, which) for m in (blocks, wanted))
        assert ours == theirs, which


def listed(mask: torch_flex.BlockMask, which: str) -> list[list[list[int]]]:
    """Of every row and every block the blocks named in a mask, in order."""
    counts, indices = getattr(mask, f"{which}_num_blocks")[:, 0], getattr(mask, f"{which}_indices")[:, 0]
    assert counts.dtype == indices.dtype == torch.int32
    assert ((indices >= 0) & (indices < indices.shape[-1])).all(), "kernels load what lies behind the last one too"
    return [[line[:n].tolist() for n, line in zip(*row, strict=True)] for row in zip(counts, indices, strict=True)]


def test_a_sink_that_weighs_nothing_changes_nothing_and_one_that_weighs_all_leaves_nothing() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.tensor([[[-90.0, 0.0, 90.0]] * 2])
    assert torch.equal(flex.with_sinks(out, lse, torch.full((2,), -torch.inf)), out)
    assert torch.equal(flex.with_sinks(out, lse, torch.full((2,), torch.inf)), torch.zeros_like(out))
    half = flex.with_sinks(out.bfloat16(), lse, lse[0, :, 1])
    assert half.dtype == torch.bfloat16
    assert torch.equal(half[:, :, 1], out.bfloat16()[:, :, 1] / 2)


def test_a_block_is_one_graph_without_a_square_mask_whatever_the_length() -> None:
    """Traced as on CUDA and run by torch's reference: for the first layer, whose input needs no gradient, and for the others, and
    both again for lengths of any size. No tensor of T x T is in any."""
    assert run_script("flex_traced") == "2 4 4 [] []\n"


FITS = {"device": "cuda", "dtype": torch.bfloat16, "size": 64, "value_size": 96, "n_keys": 5}


@pytest.mark.parametrize(
    ("fits", "changed"),
    [
        *((True, changed) for changed in ({}, {"dtype": torch.float32, "size": 256}, {"size": 16})),
        *((False, {name: size}) for name in ("size", "value_size") for size in (15, 257)),
        *((False, changed) for changed in ({"device": "cpu"}, {"dtype": torch.float64}, {"n_keys": 6})),
    ],
)
def test_what_its_kernels_take_is_theirs_when_it_is_compiled(fits: bool, changed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {**FITS, **changed}
    with FakeTensorMode():  # no GPU is needed to say where a tensor would be
        sizes = (4, 5, how["size"]), (2, how["n_keys"], how["size"]), (2, how["n_keys"], how["value_size"])
        q, k, v = (torch.empty(1, *size, dtype=how["dtype"], device=how["device"]) for size in sizes)
    assert not flex.serves(q, k, v)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert flex.serves(q, k, v) is fits
    assert torch.func.vmap(lambda x: x + flex.serves(q, k, v))(torch.zeros(2)).tolist() == [0.0, 0.0]


def kernel_errors(kind: str, device: str, dtype: str) -> list[float]:
    """Of Inductor's kernels, as shares of what float64 gives, in the L2 norm: of the result and of every gradient. 517 tokens
    have blocks that are seen whole, seen in part and cut off."""
    printed = run_script("flex_kernel", kind, device, dtype)
    return [float(line) for line in printed.split()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels need CUDA, and this machine has none")
@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_its_kernels_equal_plain_sums(kind: str, dtype: str, bound: float) -> None:
    errors = kernel_errors(kind, "cuda", dtype)
    assert len(errors) == 5
    assert max(errors) < bound


@pytest.mark.soak
@pytest.mark.parametrize("kind", SEEN)
def test_its_kernel_for_processors_equals_plain_sums(kind: str) -> None:
    """A forward alone, which reads the lists of blocks as the kernels for CUDA do."""
    assert max(kernel_errors(kind, "cpu", "float32")) < 1e-5
