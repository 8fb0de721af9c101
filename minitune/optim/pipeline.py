"""Optimizer taken apart: the clips that it begins with, and the transforms that each leaf then
goes through.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune import tree
from minitune.optim.transforms import GradientTransformation, slice_limit
from minitune.tree import Tree


class Link(NamedTuple):
    """Transform of a chain with its state."""

    transform: Any
    state: Tree


class Pipeline(NamedTuple):
    """Leaves that go through the same transforms behind the clips.

    A partition's rule knows its leaves alone, by their place in `numbers`; the transforms behind it
    know the whole tree.
    """

    rule: Link
    tail: Sequence[Link]
    numbers: Sequence[int]
    is_part: bool  # True if the rule knows the leaves of `numbers` only


class Place(NamedTuple):
    """Elements start .. end of the leaf at place `leaf` in a pipeline's numbers."""

    leaf: int
    start: int
    end: int


def split_optimizer(
    optimizer: GradientTransformation, state: Tree, paths: Sequence[str], leaves: Sequence[Tensor]
) -> tuple[list[Link], list[Pipeline]]:
    """(leading clips, pipelines behind them): one pipeline of all leaves, or one for each rule of a
    partition.

    There is no pipeline where nothing follows the clips.
    """
    links_of = getattr(optimizer, "links", lambda state: [(optimizer, state)])
    links = [Link(*link) for link in links_of(state)]

    # a clip depends on the norm of the whole gradient, which a step knows before it begins
    is_clip = [hasattr(link.transform, "gradient_factor") for link in links]
    n_clips = is_clip.index(False) if False in is_clip else len(links)
    clips, rest = links[:n_clips], links[n_clips:]
    if not rest:
        return clips, []

    rule, *tail = rest
    if not hasattr(rule.transform, "branches"):
        return clips, [Pipeline(rule, tail, range(len(leaves)), is_part=False)]
    branches = rule.transform.branches(rule.state, paths, leaves)
    return clips, [
        Pipeline(Link(part.rule, part.state), tail, part.numbers, is_part=True) for part in branches
    ]


def is_sliceable(pipelines: Sequence[Pipeline], leaves: Sequence[Tensor]) -> bool:
    """True if every transform declares how it is cut, and parameters and state are laid out in the
    order of their elements.
    """
    links = [link for pipeline in pipelines for link in (pipeline.rule, *pipeline.tail)]
    if not links or not all(hasattr(link.transform, "scope") for link in links):
        return False
    states = [link.state for link in links]
    return all(x.is_contiguous() for x in leaves) and all(
        x.is_contiguous() for x in tree.leaves(states)
    )


def is_elementwise(pipeline: Pipeline) -> bool:
    """True if an element's update depends on no other element."""
    return all(link.transform.scope == "element" for link in (pipeline.rule, *pipeline.tail))


def places_in_turn(pipeline: Pipeline, leaves: Sequence[Tensor]) -> Iterator[list[Place]]:
    """Places that are updated together, one list after the other.

    A list is one slice of a leaf if every transform is element-wise; else it is whole leaves, those
    of one shape together up to the limit.
    """
    members = [leaves[i] for i in pipeline.numbers]
    if is_elementwise(pipeline):
        for index, leaf in enumerate(members):
            limit = slice_limit(leaf.device)
            starts = [k * limit for k in range(max(1, leaf.numel() // limit))]
            ends = [*starts[1:], leaf.numel()]
            yield from ([Place(index, start, end)] for start, end in zip(starts, ends, strict=True))
        return

    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, leaf in enumerate(members):
        by_shape.setdefault((leaf.shape, leaf.device), []).append(index)
    for (shape, device), indices in by_shape.items():
        n_together = max(1, slice_limit(device) // max(1, shape.numel()))
        for first in range(0, len(indices), n_together):
            yield [Place(index, 0, shape.numel()) for index in indices[first : first + n_together]]
