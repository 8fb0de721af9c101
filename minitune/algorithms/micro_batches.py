"""Sums of an objective and its gradients over a step's micro-batches and over all ranks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from minitune import tree
from minitune.algorithms.objective import Objective
from minitune.autodiff.value_and_grad import accumulate, value_and_grad
from minitune.sharding.collectives import max_over_ranks
from minitune.sharding.parts import is_shared
from minitune.sharding.ranks import Dealt, Ranks
from minitune.tree import Tree
from minitune.types import AnyBatch, Params, Trainable


def micro_batches(batch: AnyBatch, n_rows: int | None) -> list[AnyBatch]:
    """Batch in parts of n_rows rows; None: in one."""
    total = len(tree.leaves(batch)[0])
    size = n_rows or total
    return [tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, total, size)]


def summed_over_ranks(
    objective: Objective,
    trainable: Trainable,
    params: Params,
    parts: Sequence[AnyBatch],
    ranks: Ranks,
) -> Tree:
    """((loss, reports), gradients), summed over the micro-batches of a step, of all ranks.

    `ranks` share out the parts, which all of them have; alone, each has parts of its own. Ranks
    that share weights ask one another for them in every micro-batch. So all make as many forwards
    as the one with the most: the others repeat one of theirs, with weight zero.
    """
    evaluate = value_and_grad(objective, has_aux=True)
    if ranks.size == 1 and not is_shared((params, trainable)):
        return ranks.sum(accumulate(partial(evaluate, trainable, params), parts))
    idle = value_and_grad(_weightless(objective), has_aux=True)

    def of_dealt(one: Dealt[AnyBatch]) -> Tree:
        return (evaluate if one.counts else idle)(trainable, params, one.part)

    dealt = list(ranks.deal(parts))
    if ranks.size == 1:
        dealt += [Dealt(parts[-1], counts=False)] * (max_over_ranks(len(parts)) - len(parts))
    return ranks.sum(accumulate(of_dealt, dealt))


def _weightless(objective: Objective) -> Objective:
    """Objective whose means, and with them its gradients, count nothing."""

    def weightless(trainable: Trainable, params: Params, batch: Any) -> Any:
        loss, reports = objective(trainable, params, batch)
        return loss.weightless(), {name: mean.weightless() for name, mean in reports.items()}

    return weightless
