"""Steps that are taken where parameters and states lie: slice by slice, or by a kernel."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import hardware, tree
from minitune.optim.pipeline import (
    Link,
    Pipeline,
    Place,
    places_in_turn,
)
from minitune.optim.transforms import Chain, Slice, slice_tree
from minitune.tree import Tree
from minitune.types import widen


class Gradients(NamedTuple):
    """Gradients that are still to be divided and clipped, and whether the step counts (None: it
    does).
    """

    leaves: Sequence[Tensor]
    divisor: Float[Tensor, ""]
    norm: Float[Tensor, ""]  # of leaves / divisor
    is_finite: Bool[Tensor, ""] | None


def where_finite(is_finite: Tensor, new: Tree, old: Tree) -> Tree:
    """New leaves if is_finite, else the old ones, without asking which on the host."""
    return tree.map(lambda x, y: torch.where(is_finite.to(x.device), x, y), new, old)


def donate_step(
    clips: Sequence[Link],
    pipelines: Sequence[Pipeline],
    gradients: Gradients,
    paths: Sequence[str],
    leaves: Sequence[Tensor],
) -> None:
    """Take the step where params and state lie."""
    clip_factors: list[Tensor] | None = None
    for pipeline in pipelines:
        if _is_fused(pipeline, gradients, leaves):
            _donate_fused(clips, pipeline, gradients, paths, leaves)
            continue
        if clip_factors is None:
            clip_factors = _clip_factors(clips, gradients)
        _donate_slices(clip_factors, pipeline, gradients, paths, leaves)

    # step counts last: until here every slice needs the old ones
    links = [*(pipeline.rule for pipeline in pipelines), *pipelines[0].tail]
    counts = [link.transform.counts(link.state) for link in links]
    taken = 1 if gradients.is_finite is None else gradients.is_finite
    tree.donate(counts, tree.map(lambda count: count + taken, counts))


def _is_fused(pipeline: Pipeline, gradients: Gradients, leaves: Sequence[Tensor]) -> bool:
    """True if the rule has a kernel for these tensors, and only factors and then a rounding come
    behind it.
    """
    rule, tail = pipeline.rule.transform, [link.transform for link in pipeline.tail]
    if tail and hasattr(tail[-1], "rounding_after"):
        tail = tail[:-1]
    if not all(hasattr(part, "path_factor") or hasattr(part, "step_factor") for part in tail):
        return False
    if not hasattr(rule, "fused_update"):
        return False
    params = [leaves[i] for i in pipeline.numbers]
    grads = [gradients.leaves[i] for i in pipeline.numbers]
    return rule.is_fusable(params, grads, pipeline.rule.state)


def _donate_fused(
    clips: Sequence[Link],
    pipeline: Pipeline,
    gradients: Gradients,
    paths: Sequence[str],
    leaves: Sequence[Tensor],
) -> None:
    """Take the step by the rule's kernel: the division and clips scale its gradients, other factors
    its learning rate.
    """
    # the learning rate's factors, and the rounding at the end
    device = gradients.divisor.device
    lr_scale = torch.ones((), dtype=hardware.widest_float(device), device=device)
    by_path = []
    rounded = None
    for transform, state in pipeline.tail:
        if hasattr(transform, "step_factor"):
            lr_scale = lr_scale * transform.step_factor(state)
        elif hasattr(transform, "path_factor"):
            by_path.append(transform)
        else:
            rounded = transform.rounding_after(state)

    own_paths = [paths[i] for i in pipeline.numbers]
    factors = [
        math.prod((part.path_factor(path) for part in by_path), start=1.0) for path in own_paths
    ]
    pipeline.rule.transform.fused_update(
        own_paths,
        [leaves[i] for i in pipeline.numbers],
        [gradients.leaves[i] for i in pipeline.numbers],
        pipeline.rule.state,
        grad_scale=_grad_scale(clips, gradients),
        lr_scale=lr_scale,
        path_factors=factors,
        rounded=rounded,
        is_finite=gradients.is_finite,
    )


def _grad_scale(clips: Sequence[Link], gradients: Gradients) -> Float[Tensor, ""]:
    """Factor of a gradient: the division, and each clip by the norm that the one before leaves."""
    scale = 1 / gradients.divisor
    norm = gradients.norm
    for clip in clips:
        factor = clip.transform.gradient_factor(norm)
        scale = scale * factor
        norm = norm * factor
    return scale


def _clip_factors(clips: Sequence[Link], gradients: Gradients) -> list[Tensor]:
    """Factor of each clip, to the last bit as its `update` has it."""
    factors: list[Tensor] = []
    for clip in clips:
        norms = torch.stack(
            [tree.norm(scaled_gradient(g, gradients.divisor, factors)) for g in gradients.leaves]
        )
        factors = [*factors, clip.transform.gradient_factor(torch.linalg.vector_norm(norms))]
    return factors


def scaled_gradient(g: Tensor, divisor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Gradient, divided and then clipped, in float32 or wider."""
    wide = widen(g)
    return reduce(lambda x, factor: x * factor.to(x.dtype), factors, wide / divisor.to(wide.dtype))


def _donate_slices(
    factors: Sequence[Tensor],
    pipeline: Pipeline,
    gradients: Gradients,
    paths: Sequence[str],
    leaves: Sequence[Tensor],
) -> None:
    """Take the step slice by slice, each written before the next is computed: `update` to the last
    bit.
    """
    for places in places_in_turn(pipeline, leaves):
        # a call of its own, after which nothing of these slices lives on beside the next ones
        _donate_places(places, factors, pipeline, gradients, paths, leaves)


def _donate_places(
    places: Sequence[Place],
    factors: Sequence[Tensor],
    pipeline: Pipeline,
    gradients: Gradients,
    paths: Sequence[str],
    leaves: Sequence[Tensor],
) -> None:
    """Take the step of these places of the pipeline's leaves, where params and state lie."""
    # a rule of a partition counts the leaves that it knows, the transforms behind it those of the
    # whole tree
    numbers = [pipeline.numbers[place.leaf] for place in places]
    in_tree = [
        Slice(i, paths[i], place.start, place.end) for i, place in zip(numbers, places, strict=True)
    ]
    in_rule = in_tree
    if pipeline.is_part:
        in_rule = [
            part._replace(number=place.leaf) for part, place in zip(in_tree, places, strict=True)
        ]

    # views of what belongs to the places
    params = slice_tree(leaves, in_tree)
    grads = slice_tree(gradients.leaves, in_tree)
    rule, tail = pipeline.rule, pipeline.tail
    tail_states = (link.transform.slice_state(link.state, in_tree) for link in tail)
    state = (rule.transform.slice_state(rule.state, in_rule), *tail_states)

    # their step, by definition
    update = Chain(tuple(link.transform for link in (rule, *tail))).update
    updates, after = update(
        tree.map(lambda g: scaled_gradient(g, gradients.divisor, factors), grads), state, params
    )
    new = tree.map(updated, params, updates), after
    if gradients.is_finite is not None:
        new = where_finite(gradients.is_finite, new, (params, state))
    tree.donate((params, state), new)


def updated(p: Tensor, u: Tensor) -> Tensor:
    """Parameter with its update, in its own dtype."""
    return (p.detach() + u).to(p.dtype)
