"""Optimizers of leaves of which each rank holds a part."""

from collections.abc import Iterator, Sequence
from typing import Any

from minitune import tree
from minitune.errors import InputError
from minitune.optim.apply import apply_gradients
from minitune.optim.pipeline import Link, split_optimizer
from minitune.optim.transforms import GradientTransformation
from minitune.sharding.parts import is_sharded, local_parts, placed_like
from minitune.tree import Tree
from minitune.types import Trainable


def begin_state(optimizer: GradientTransformation, trainable: Trainable) -> Tree:
    """State before the first step, in parts like the leaves that it belongs to; InputError for an
    optimizer that needs more of a leaf than the part of one rank.
    """
    state = optimizer.init(trainable)
    shared = [path for path, leaf in tree.items(trainable) if is_sharded(leaf)]
    for link in _links(optimizer, state, trainable, shared):
        moments = _moments(link)
        if not _sees_elements(link) or (moments and not any(map(is_sharded, moments))):
            raise _needs_whole_leaves(link, shared[0])
    return state


def check_shared(
    optimizer: GradientTransformation, trainable: Trainable, shared: Sequence[str]
) -> None:
    """InputError for an optimizer that needs more of a leaf than a part; shared: names of leaves
    that ranks will hold in parts.
    """
    if not shared:
        return
    shapes = {leaf.shape for leaf in tree.leaves(trainable)}
    for link in _links(optimizer, optimizer.init(trainable), trainable, shared):
        # what is not of a leaf's shape is of blocks, which parts would cut
        has_parts = all(moment.shape in shapes for moment in _moments(link))
        if not _sees_elements(link) or not has_parts:
            raise _needs_whole_leaves(link, shared[0])


def _links(
    optimizer: GradientTransformation, state: Tree, trainable: Trainable, shared: Sequence[str]
) -> Iterator[Link]:
    """Transforms, with their states, that any of the shared leaves goes through."""
    if not shared:
        return
    paths, leaves = zip(*tree.items(trainable), strict=True)
    _, pipelines = split_optimizer(optimizer, state, paths, leaves)
    for pipeline in pipelines:
        if any(paths[i] in shared for i in pipeline.numbers):
            yield from (pipeline.rule, *pipeline.tail)


def _moments(link: Link) -> list[Any]:
    """Leaves of a transform's state but for its counts."""
    return [leaf for leaf in tree.leaves(link.state) if leaf.ndim]


def _sees_elements(link: Link) -> bool:
    """True for a transform that knows an element's state from that element alone."""
    return getattr(link.transform, "scope", None) == "element"


def _needs_whole_leaves(link: Link, path: str) -> InputError:
    return InputError(
        f"optim: {type(link.transform).__name__} updates {path}, of which each rank holds a part, "
        "expected an optimizer that knows an element's state from that element alone; use AdamW "
        "or SGD, or a plan that leaves the trained weights whole, such as dp"
    )


def apply_to_parts(
    optimizer: GradientTransformation, grads: Tree, state: Tree, params: Tree, **how: Any
) -> tuple[Tree, Tree]:
    """(params, state) after apply_gradients, which sees the parts that this rank holds; how: its
    other arguments.
    """
    parts = local_parts((grads, state, params))
    return placed_like(apply_gradients(optimizer, *parts, **how), (params, state))
