"""Mixture whose experts several ranks share: each computes with its own, on the rows of all."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from minitune.autodiff.operator import outside_graphs
from minitune.nn.moe import ExpertLinear, Routes, grouped, in_one_kernel, rows_of_each
from minitune.sharding.experts import ExpertRanks, exchanged_rows, tied


@outside_graphs
def mixture_of_ranks(
    x: Float[Tensor, "n D"],
    routes: Routes,
    up: Sequence[ExpertLinear],
    activation: Callable[..., Float[Tensor, "m F"]],
    down: ExpertLinear,
    ranks: ExpertRanks,
    *,
    scale_input: bool = False,
    leaves: Sequence[Tensor] = (),
) -> Float[Tensor, "n D"]:
    """Result of `mixture` for the tokens of this rank, where up and down are the experts that it
    has of all: each row goes to the rank of its expert, and comes back.

    leaves: tensors of the experts of all ranks. All ranks call it together, those without a row as
    well; their hosts wait for the numbers of rows, and torch.compile leaves it out of its graphs.
    """
    n_own = len(down.weights)
    flat = routes.experts.flatten()
    order = flat.argsort(stable=True)
    numbers = torch.arange(n_own * ranks.size, device=flat.device)
    ends = torch.searchsorted(flat[order], numbers, right=True)
    # [ranks experts], of the rows that go to each and that come from each
    going = ends.diff(prepend=ends.new_zeros(1)).view(ranks.size, n_own)
    coming = exchanged_rows(going, [1] * ranks.size, [1] * ranks.size, ranks)
    sent, received = _lengths(going, coming, len(flat))

    rows = x.repeat_interleave(routes.experts.shape[1], 0).index_select(0, order)
    weights = routes.weights.flatten().index_select(0, order)[:, None]
    rows = rows * weights.to(rows.dtype) if scale_input else rows
    rows = exchanged_rows(rows, sent, received, ranks)
    by_expert = _by_expert(coming, len(rows))
    y = _own_experts(rows.index_select(0, by_expert), coming.sum(0), up, activation, down)
    y = tied(y.index_select(0, by_expert.argsort()), leaves)

    y = exchanged_rows(y, received, sent, ranks)
    y = (y if scale_input else y * weights).index_select(0, order.argsort())
    return y.unflatten(0, routes.experts.shape).sum(1).to(x.dtype)


def _lengths(going: Tensor, coming: Tensor, n_rows: int) -> tuple[list[int], list[int]]:
    """Rows that go to each rank and that come from it, as many to all as from all and as even as
    can be where tensors have no values.
    """
    if isinstance(going, FakeTensor):
        even = rows_of_each(going[:, 0], n_rows)
        return even, even
    sent, received = torch.stack([going.sum(1), coming.sum(1)]).tolist()
    return sent, received


def _by_expert(coming: Tensor, n_rows: int) -> Tensor:
    """Places of rows in the order of their experts; they have come by the rank that sent them, and
    in the order of their experts from each.
    """
    n_ranks, n_own = coming.shape
    expert = torch.arange(n_own, device=coming.device).repeat(n_ranks)
    return expert.repeat_interleave(coming.flatten(), output_size=n_rows).argsort(stable=True)


def _own_experts(
    rows: Tensor,
    n_rows: Tensor,
    up: Sequence[ExpertLinear],
    activation: Callable[..., Tensor],
    down: ExpertLinear,
) -> Tensor:
    """Results of the experts of this rank on rows in their order, so many of each."""
    at_once = len(rows) > 0 and all(in_one_kernel(one.stack, rows) for one in (*up, down))
    ends = n_rows.cumsum(0).to(torch.int32)
    groups = ends if at_once else rows_of_each(ends, len(rows))
    return grouped(activation(*(grouped(rows, groups, maps) for maps in up)), groups, down)
