"""One step of an optimizer over a tree of parameters: the one place that writes them.

What `update` defines is added to the parameters. An optimizer that declares how it can be cut
(transforms.py) is applied slice by slice, or by a kernel of its own, where parameters and state
lie; any other by its definition.

On a device that works asynchronously nothing here waits for it: a step that is not finite is
computed and not selected.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import hardware, tree
from minitune.autodiff.value_and_grad import under_transform
from minitune.optim.pipeline import (
    Link,
    Pipeline,
    Place,
    is_sliceable,
    places_in_turn,
    split_optimizer,
)
from minitune.optim.transforms import Chain, GradientTransformation, Slice, slice_tree
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


def apply_gradients(
    optimizer: GradientTransformation,
    grads: Tree,
    state: Tree,
    params: Tree,
    *,
    divisor: Float[Tensor, ""],
    norm: Float[Tensor, ""],
    is_finite: Bool[Tensor, ""],
    donate: bool,
) -> tuple[Tree, Tree]:
    """(params, state) after one step on grads / divisor, whose norm is `norm`; as they were if not
    is_finite.

    With donate=True the new values are written over the old ones, slice by slice: optimizers of
    minitune then allocate nothing as large as the parameters.
    """
    if under_transform():
        # a decision for each element of a batch, which no `if` can take
        return _select(
            is_finite, _by_definition(optimizer, grads, state, params, divisor), (params, state)
        )
    selects = hardware.is_asynchronous(divisor.device)
    if not selects and not is_finite:
        return tree.map(Tensor.detach, params), state

    paths, leaves = zip(*tree.items(params), strict=True)
    clips, pipelines = split_optimizer(optimizer, state, paths, leaves)
    if is_sliceable(pipelines, leaves):
        if not donate:
            params, state = tree.map(lambda x: x.detach().clone(), (params, state))
            leaves = tree.leaves(params)
            clips, pipelines = split_optimizer(optimizer, state, paths, leaves)
        gradients = Gradients(tree.leaves(grads), divisor, norm, is_finite if selects else None)
        _donate_step(clips, pipelines, gradients, paths, leaves)
        return params, state

    new = _by_definition(optimizer, grads, state, params, divisor)
    is_finite = is_finite & _has_finite_updates(new[0], params, names_leaf=not selects)
    new = _select(is_finite, new, (params, state)) if selects else new
    return tree.donate((params, state), new) if donate else new


def apply_gradients_each(
    optimizers: Sequence[GradientTransformation],
    grads: Tree,
    states: Sequence[Tree],
    params: Tree,
    *,
    divisor: Float[Tensor, "n"],
    norm: Float[Tensor, "n"],
    is_finite: Bool[Tensor, "n"],
) -> None:
    """Take the step of apply_gradients for each of n members of stacked trees, under its own
    optimizer and with its own state.

    Written over params and states.
    """
    paths, stacked = zip(*tree.items(params), strict=True)
    params_by_member = zip(*(leaf.unbind() for leaf in stacked), strict=True)
    # one copy for all members, where one is due
    grads_by_member = zip(*(leaf.contiguous().unbind() for leaf in tree.leaves(grads)), strict=True)
    selects = hardware.is_asynchronous(divisor.device)
    members = zip(optimizers, states, params_by_member, grads_by_member, strict=True)
    for i, (optimizer, state, member_params, member_grads) in enumerate(members):
        if not selects and not is_finite[i]:
            continue
        clips, pipelines = split_optimizer(optimizer, state, paths, member_params)
        if is_sliceable(pipelines, member_params):
            taken = is_finite[i] if selects else None
            gradients = Gradients(member_grads, divisor[i], norm[i], taken)
            _donate_step(clips, pipelines, gradients, paths, member_params)
            continue
        trees = tree.rebuild(grads, member_grads), state, tree.rebuild(params, member_params)
        own = {"divisor": divisor[i], "norm": norm[i], "is_finite": is_finite[i]}
        apply_gradients(optimizer, *trees, **own, donate=True)


def scratch_bytes(optimizer: GradientTransformation, params: Tree) -> int:
    """About how many bytes a donated step allocates beside what it is given; by definition, three
    trees like params.
    """
    paths, leaves = zip(*tree.items(params), strict=True)
    _, pipelines = split_optimizer(optimizer, optimizer.init(params), paths, leaves)
    if not is_sliceable(pipelines, leaves):
        return 3 * tree.n_bytes(params)
    sizes = []
    for pipeline in pipelines:
        rounds = any(hasattr(link.transform, "rounding_after") for link in pipeline.tail)
        sizes.append(
            pipeline.rule.transform.scratch_bytes(
                [leaves[i] for i in pipeline.numbers], rounds=rounds
            )
        )
    return max(sizes)


def _by_definition(
    optimizer: GradientTransformation, grads: Tree, state: Tree, params: Tree, divisor: Tensor
) -> tuple[Tree, Tree]:
    """(params, state) after the step, as new trees."""
    updates, after = optimizer.update(
        tree.map(lambda g: _scaled(g, divisor, ()), grads), state, params
    )
    return tree.map(_added, params, updates), after


def _has_finite_updates(new: Tree, old: Tree, *, names_leaf: bool) -> Bool[Tensor, ""]:
    """True if all updates are finite; on a host that reads it, an error names the leaf.

    Of optimizers that are applied by their definition alone, which may be anybody's.
    """
    bad = tree.first_not_finite(tree.norms(tree.map(lambda x, y: widen(x) - widen(y), new, old)))
    if names_leaf and bad >= 0:
        path = [path for path, _ in tree.items(old)][int(bad)]
        raise FloatingPointError(
            f"optim: the update of {path} is not finite, expected a finite one of a finite "
            "gradient; nothing was written, look at the optimizer"
        )
    return bad < 0


def _select(is_finite: Tensor, new: Tree, old: Tree) -> Tree:
    """The new leaves if is_finite, else the old ones, without asking which on the host."""
    return tree.map(lambda x, y: torch.where(is_finite.to(x.device), x, y), new, old)


def _donate_step(
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
    # the gradient's factor: each clip sees the norm that the one before it leaves
    grad_scale = 1 / gradients.divisor
    norm = gradients.norm
    for clip in clips:
        factor = clip.transform.gradient_factor(norm)
        grad_scale = grad_scale * factor
        norm = norm * factor

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
    pipeline.rule.transform.fused_update(
        own_paths,
        [leaves[i] for i in pipeline.numbers],
        [gradients.leaves[i] for i in pipeline.numbers],
        pipeline.rule.state,
        grad_scale=grad_scale,
        lr_scale=lr_scale,
        path_factors=[
            math.prod((part.path_factor(path) for part in by_path), start=1.0) for path in own_paths
        ],
        rounded=rounded,
        is_finite=gradients.is_finite,
    )


def _clip_factors(clips: Sequence[Link], gradients: Gradients) -> list[Tensor]:
    """The factor of each clip, to the last bit as its `update` has it."""
    factors: list[Tensor] = []
    for clip in clips:
        norms = torch.stack(
            [tree.norm(_scaled(g, gradients.divisor, factors)) for g in gradients.leaves]
        )
        factors = [*factors, clip.transform.gradient_factor(torch.linalg.vector_norm(norms))]
    return factors


def _scaled(g: Tensor, divisor: Tensor, factors: Sequence[Tensor]) -> Tensor:
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
        tree.map(lambda g: _scaled(g, gradients.divisor, factors), grads), state, params
    )
    new = tree.map(_added, params, updates), after
    if gradients.is_finite is not None:
        new = _select(gradients.is_finite, new, (params, state))
    tree.donate((params, state), new)


def _added(p: Tensor, u: Tensor) -> Tensor:
    return (p.detach() + u).to(p.dtype)
