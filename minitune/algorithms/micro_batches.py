"""Sums of an objective and its gradients over a step's micro-batches and over all ranks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from minitune import tree
from minitune.algorithms.objective import Objective
from minitune.autodiff.value_and_grad import accumulate, value_and_grad
from minitune.sharding.collectives import max_over_ranks, sum_over_ranks
from minitune.sharding.parts import is_shared
from minitune.tree import Tree
from minitune.types import AnyBatch, Mean, Params, Trainable


def micro_batches(batch: AnyBatch, n_rows: int | None) -> list[AnyBatch]:
    """Batch in parts of n_rows rows; None: in one."""
    total = len(tree.leaves(batch)[0])
    size = n_rows or total
    return [tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, total, size)]


def summed_over_ranks(
    objective: Objective, trainable: Trainable, params: Params, parts: Sequence[AnyBatch]
) -> Tree:
    """((loss, reports), gradients), summed over these micro-batches and those of all other ranks.

    Ranks that share weights ask one another for them in every micro-batch. So all make as many
    forwards as the rank with the most micro-batches: the others repeat their last one, with weight
    zero.
    """
    evaluate = partial(value_and_grad(objective, has_aux=True), trainable, params)
    if not is_shared((params, trainable)):
        return sum_over_ranks(accumulate(evaluate, parts))
    idle = partial(value_and_grad(_weightless(objective), has_aux=True), trainable, params)
    calls = [(evaluate, part) for part in parts]
    calls += [(idle, parts[-1])] * (max_over_ranks(len(parts)) - len(parts))
    return sum_over_ranks(accumulate(lambda call: call[0](call[1]), calls))


def _weightless(objective: Objective) -> Objective:
    """Objective whose means, and with them its gradients, count nothing."""

    def nothing(mean: Mean) -> Mean:
        return Mean(mean.total * 0, mean.weight * 0)

    def weightless(trainable: Trainable, params: Params, batch: Any) -> Any:
        loss, reports = objective(trainable, params, batch)
        return nothing(loss), {name: nothing(mean) for name, mean in reports.items()}

    return weightless
