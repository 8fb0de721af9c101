"""Optimizers of leaves of which each rank holds a part."""

from typing import Any

from minitune import tree
from minitune.errors import InputError
from minitune.optim.apply import apply_gradients
from minitune.optim.pipeline import split_optimizer
from minitune.optim.transforms import GradientTransformation
from minitune.sharding.parts import is_sharded, local_parts, placed_like
from minitune.tree import Tree
from minitune.types import Trainable


def begin_state(optimizer: GradientTransformation, trainable: Trainable) -> Tree:
    """State before the first step, in parts like the leaves that it belongs to; InputError for an
    optimizer that needs more of a leaf than the part of one rank.
    """
    state = optimizer.init(trainable)
    paths, leaves = zip(*tree.items(trainable), strict=True)
    shared = [path for path, leaf in tree.items(trainable) if is_sharded(leaf)]
    if not shared:
        return state
    _, pipelines = split_optimizer(optimizer, state, paths, leaves)
    for pipeline in pipelines:
        if not any(is_sharded(leaves[i]) for i in pipeline.numbers):
            continue
        for link in (pipeline.rule, *pipeline.tail):
            rule = type(link.transform).__name__
            moments = [leaf for leaf in tree.leaves(link.state) if leaf.ndim]
            has_parts = not moments or any(map(is_sharded, moments))
            if getattr(link.transform, "scope", None) != "element" or not has_parts:
                raise InputError(
                    f"optim: {rule} updates {shared[0]}, of which each rank holds a part, expected "
                    "an optimizer that knows an element's state from that element alone; use AdamW "
                    "or SGD, or a plan that leaves the trained weights whole, such as dp"
                )
    return state


def apply_to_parts(
    optimizer: GradientTransformation, grads: Tree, state: Tree, params: Tree, **how: Any
) -> tuple[Tree, Tree]:
    """(params, state) after apply_gradients, which sees the parts that this rank holds; how: its
    other arguments.
    """
    parts = local_parts((grads, state, params))
    return placed_like(apply_gradients(optimizer, *parts, **how), (params, state))
