"""The chunked head takes gradients in its forward: equal to whole logits for every length and chunk."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minitune import tree
from minitune.nn import head as nn_head
from minitune.nn.head import HEAD_CHUNK, HEAD_ROWS, TRAINED_HEAD_FACTOR, by_rows, head_chunk, token_losses
from minitune.quant.schemes import Int8, quantize
from minitune.types import Adapted

pytestmark = pytest.mark.fast


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_a_head_by_chunks_equals_whole_logits(data: st.DataObject, seed: int) -> None:
    """Frozen, with a delta, or trained; for losses that are summed and for values that each have a cotangent of their own."""
    generator = torch.Generator().manual_seed(seed)
    b, t, d, v = (data.draw(st.integers(1, 7)) for _ in range(4))
    chunk, p, n_values = (
        data.draw(st.integers(1, 9)),
        data.draw(st.sampled_from([0.0, 0.4, 1.0])),
        data.draw(st.sampled_from([1, 3])),
    )
    draw = {"generator": generator, "dtype": torch.float64}
    hidden, head = torch.randn(b, t, d, **draw).requires_grad_(), torch.randn(v + 1, d, **draw)
    is_adapted = data.draw(st.booleans())
    leaf = Adapted(head, torch.randn(2, d, **draw), torch.randn(v + 1, 2, **draw)) if is_adapted else head
    trained = [x.requires_grad_() for x in tree.leaves(leaf) if data.draw(st.booleans())]
    targets, mask = torch.randint(0, v + 1, (b, t), generator=generator), torch.rand(b, t, generator=generator) < p

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nats = F.cross_entropy(logits, labels, reduction="none")
        return nats if n_values == 1 else torch.stack([nats, logits.square().sum(-1), logits[:, 0]], -1)

    if data.draw(st.booleans()):
        loss = by_rows(loss, n_values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn_head, "LOSS_SLICE_LOGITS", data.draw(st.integers(1, 3)) * (v + 1))
        patch.setattr(nn_head, "HEAD_CHUNK", chunk * (v + 1))
        patch.setattr(nn_head, "HEAD_ROWS", 1)
        patch.setattr(nn_head, "TRAINED_HEAD_FACTOR", 1)
        actual = token_losses(loss, hidden, targets, mask, leaf)
    w = head + leaf.b @ leaf.a if isinstance(leaf, Adapted) else head
    whole = loss((hidden @ w.T).flatten(0, 1), targets.flatten()).unflatten(0, (b, t))
    wanted = torch.where(mask if n_values == 1 else mask[..., None], whole, 0.0)
    torch.testing.assert_close(actual, wanted)
    cotangent = torch.randn(actual.shape, **draw) if data.draw(st.booleans()) else torch.full(actual.shape, -0.7).double()
    for a, c in zip(*(torch.autograd.grad(x, [hidden, *trained], cotangent) for x in (actual, wanted)), strict=True):
        torch.testing.assert_close(a, c)


def test_the_forward_is_the_only_time_that_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    linear = nn_head.linear
    monkeypatch.setattr(nn_head, "linear", lambda *args: made.append(len(args[0])) or linear(*args))
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    head, targets, mask = torch.randn(11, 4), torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    for w in (head, quantize(head, Int8()), head.clone().requires_grad_()):
        made.clear()
        nats = token_losses(lambda y, t: F.cross_entropy(y, t, reduction="none"), hidden, targets, mask, w)
        torch.autograd.grad((3.0 * nats).sum(), hidden)
        assert made == [10]
    made.clear()
    several = token_losses(lambda y, t: torch.stack([y[:, 0], y[:, 1]], 1), hidden, targets, mask, head.clone().requires_grad_())
    torch.autograd.grad(several.sum(), hidden)
    assert made == [10]
    made.clear()
    with torch.no_grad():
        token_losses(lambda y, t: F.cross_entropy(y, t, reduction="none"), hidden, targets, mask, head)
    assert made == [10]


def test_a_loss_by_rows_keeps_the_gradient_of_its_logits_alone_and_sees_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn_head, "LOSS_SLICE_LOGITS", 4 * 50)
    row_counts: list[int] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        row_counts.append(len(logits))
        return F.cross_entropy(logits.float().tanh(), labels, reduction="none")

    logits = torch.randn(10, 50, dtype=torch.bfloat16).requires_grad_()
    nats = by_rows(loss)(logits, torch.randint(0, 50, (10,)))
    assert row_counts == [4, 4, 2]
    assert isinstance(nats.grad_fn, torch.autograd.graph.Node)
    kept = [x for node, _ in nats.grad_fn.next_functions for x in node.saved_tensors]  # pyright: ignore
    assert [(x.dtype, x.shape) for x in kept] == [(torch.bfloat16, (n, 50)) for n in row_counts]


def test_a_gradient_of_its_gradient_is_refused_by_plain_autograd_and_right_under_torch_func() -> None:
    hidden = torch.randn(1, 5, 4, dtype=torch.float64)
    head, targets = torch.randn(11, 4, dtype=torch.float64), torch.randint(0, 11, (1, 5))
    mask = torch.ones(1, 5, dtype=torch.bool)

    def total(x: torch.Tensor) -> torch.Tensor:
        return token_losses(lambda y, t: F.cross_entropy(y, t, reduction="none"), x, targets, mask, head).square().sum()

    leaf = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    second = torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(hidden)
    wanted = torch.func.grad(
        lambda x: torch.func.grad(lambda z: F.cross_entropy((z @ head.T)[0], targets[0], reduction="none").square().sum())(
            x
        ).sum()
    )(hidden)
    torch.testing.assert_close(second, wanted)


@pytest.mark.parametrize("trains", [False, True])
def test_a_chunk_has_enough_rows_for_a_matmul_and_no_more_logits_than_that_takes(trains: bool) -> None:
    limit = HEAD_CHUNK * (TRAINED_HEAD_FACTOR if trains else 1)
    for v in (97, 32_000, 128_000, 300_000):
        rows = head_chunk(torch.empty(v, 1), trains)
        assert rows >= HEAD_ROWS
        assert rows == HEAD_ROWS or limit - v < rows * v <= limit
