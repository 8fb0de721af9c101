"""One step of an optimizer over a tree of parameters: the one place that writes them.

What `update` defines is added to the parameters. An optimizer that declares how it can be cut (transforms.py) is applied slice
by slice, or by a kernel of its own, where parameters and state lie; any other by its definition.

On a device that works asynchronously nothing here waits for it: a step that is not finite is computed and not selected.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import hardware, tree
from minitune.autodiff.value_and_grad import under_transform
from minitune.optim.transforms import Chain, GradientTransformation, Slice, slice_limit, take_slice
from minitune.tree import Tree


class Link(NamedTuple):
    """A transform of a chain with its state."""

    transform: Any
    state: Tree


class Pipeline(NamedTuple):
    """Leaves that go through the same transforms behind the clips.

    A partition's rule knows its leaves alone, by their place in `numbers`; the transforms behind it know the whole tree.
    """

    rule: Link
    tail: Sequence[Link]
    numbers: Sequence[int]
    is_part: bool  # whether the rule knows the leaves of `numbers` only


class Gradients(NamedTuple):
    """Gradients that are still to be divided and clipped, and whether the step counts (None: it does)."""

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
    """(params, state) after one step on grads / divisor, whose norm is `norm`; as they were if not is_finite.

    With donate=True the new values are written over the old ones, slice by slice: optimizers of minitune then allocate nothing
    as large as the parameters.
    """
    if under_transform():
        # a decision for each element of a batch, which no `if` can take
        return _select(is_finite, _by_definition(optimizer, grads, state, params, divisor), (params, state))
    selects = hardware.is_asynchronous(divisor.device)
    if not selects and not is_finite:
        return params, state

    paths, leaves = zip(*tree.items(params), strict=True)
    if _is_sliceable(*_resolved(optimizer, state, paths, leaves), leaves):
        if not donate:
            params, state = tree.map(torch.clone, (params, state))
            leaves = tree.leaves(params)
        gradients = Gradients(tree.leaves(grads), divisor, norm, is_finite if selects else None)
        _donate_step(*_resolved(optimizer, state, paths, leaves), gradients, paths, leaves)
        return params, state

    new = _by_definition(optimizer, grads, state, params, divisor)
    new = _select(is_finite, new, (params, state)) if selects else new
    return tree.donate((params, state), new) if donate else new


def apply_gradients_each(
    optimizers: Sequence[GradientTransformation],
    grads: Tree,
    states: Sequence[Tree],
    params: Tree,
    *,
    divisors: Float[Tensor, "n"],
    norms: Float[Tensor, "n"],
    is_finite: Bool[Tensor, "n"],
) -> None:
    """Take the step of apply_gradients for each of n members of stacked trees, under its own optimizer and with its own state.

    Written over params and states.
    """
    paths, stacked = zip(*tree.items(params), strict=True)
    params_by_member = zip(*(leaf.unbind() for leaf in stacked), strict=True)
    # one copy for all members, where one is due
    grads_by_member = zip(*(leaf.contiguous().unbind() for leaf in tree.leaves(grads)), strict=True)
    selects = hardware.is_asynchronous(divisors.device)
    members = zip(optimizers, states, params_by_member, grads_by_member, divisors, norms, is_finite, strict=True)
    for optimizer, state, leaves, own_grads, divisor, norm, finite in members:
        if not selects and not finite:
            continue
        resolved = _resolved(optimizer, state, paths, leaves)
        if _is_sliceable(*resolved, leaves):
            _donate_step(*resolved, Gradients(own_grads, divisor, norm, finite if selects else None), paths, leaves)
            continue
        trees = tree.rebuild(grads, own_grads), state, tree.rebuild(params, leaves)
        apply_gradients(optimizer, *trees, divisor=divisor, norm=norm, is_finite=finite, donate=True)


def scratch_bytes(optimizer: GradientTransformation, params: Tree) -> int:
    """About how many bytes a donated step allocates beside what it is given; by definition, three trees like params."""
    paths, leaves = zip(*tree.items(params), strict=True)
    clips, pipelines = _resolved(optimizer, optimizer.init(params), paths, leaves)
    if not _is_sliceable(clips, pipelines, leaves):
        return 3 * tree.n_bytes(params)
    sizes = []
    for pipeline in pipelines:
        rounds = any(hasattr(link.transform, "rounding_after") for link in pipeline.tail)
        sizes.append(pipeline.rule.transform.scratch_bytes([leaves[i] for i in pipeline.numbers], rounds=rounds))
    return max(sizes)


def _by_definition(
    optimizer: GradientTransformation, grads: Tree, state: Tree, params: Tree, divisor: Tensor
) -> tuple[Tree, Tree]:
    """(params, state) after the step, as new trees."""
    updates, after = optimizer.update(tree.map(lambda g: g / divisor.to(g.dtype), grads), state, params)
    return tree.map(_added, params, updates), after


def _select(is_finite: Tensor, new: Tree, old: Tree) -> Tree:
    """The new leaves if is_finite, else the old ones, without asking which on the host."""
    return tree.map(lambda x, y: torch.where(is_finite.to(x.device), x, y), new, old)


def _resolved(
    optimizer: GradientTransformation, state: Tree, paths: Sequence[str], leaves: Sequence[Tensor]
) -> tuple[list[Link], list[Pipeline]]:
    """(leading clips, pipelines behind them): one of all leaves, or one for each rule of a partition; none for clips alone."""
    links_of = getattr(optimizer, "links", lambda state: [(optimizer, state)])
    links = [Link(*link) for link in links_of(state)]
    n_clips = next((i for i, link in enumerate(links) if not hasattr(link.transform, "gradient_factor")), len(links))
    clips, rest = links[:n_clips], links[n_clips:]
    if not rest:
        return clips, []
    rule, *tail = rest
    if not hasattr(rule.transform, "branches"):
        return clips, [Pipeline(rule, tail, range(len(leaves)), is_part=False)]
    branches = rule.transform.branches(rule.state, paths, leaves)
    return clips, [Pipeline(Link(part.rule, part.state), tail, part.numbers, is_part=True) for part in branches]


def _is_sliceable(clips: Sequence[Link], pipelines: Sequence[Pipeline], leaves: Sequence[Tensor]) -> bool:
    """True if every transform declares how it is cut, and parameters and state are laid out in the order of their elements."""
    links = [link for pipeline in pipelines for link in (pipeline.rule, *pipeline.tail)]
    if not links or not all(hasattr(link.transform, "scope") for link in links):
        return False
    states = [link.state for link in links]
    return all(x.is_contiguous() for x in leaves) and all(x.is_contiguous() for x in tree.leaves(states))


def _donate_step(
    clips: Sequence[Link], pipelines: Sequence[Pipeline], gradients: Gradients, paths: Sequence[str], leaves: Sequence[Tensor]
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
    """True if the rule has a kernel for these tensors, and only factors and then a rounding come behind it."""
    rule, tail = pipeline.rule.transform, [link.transform for link in pipeline.tail]
    if tail and hasattr(tail[-1], "rounding_after"):
        tail = tail[:-1]
    if not all(hasattr(part, "path_factor") or hasattr(part, "step_factor") for part in tail):
        return False
    own = [[values[i] for i in pipeline.numbers] for values in (leaves, gradients.leaves)]
    return hasattr(rule, "fused_update") and rule.is_fusable(*own, pipeline.rule.state)


def _donate_fused(
    clips: Sequence[Link], pipeline: Pipeline, gradients: Gradients, paths: Sequence[str], leaves: Sequence[Tensor]
) -> None:
    """Take the step by the rule's kernel: the division and clips scale its gradients, other factors its learning rate."""
    device = gradients.divisor.device
    grad_scale, norm = 1 / gradients.divisor, gradients.norm
    for clip in clips:
        factor = clip.transform.gradient_factor(norm)
        grad_scale, norm = grad_scale * factor, norm * factor

    lr_scale, by_path, rounded = torch.ones((), dtype=hardware.widest_float(device), device=device), [], None
    for transform, state in pipeline.tail:
        if hasattr(transform, "step_factor"):
            lr_scale = lr_scale * transform.step_factor(state)
        elif hasattr(transform, "path_factor"):
            by_path.append(transform)
        else:
            rounded = transform.rounding_after(state)

    own_paths, own_leaves, own_grads = ([values[i] for i in pipeline.numbers] for values in (paths, leaves, gradients.leaves))
    pipeline.rule.transform.fused_update(
        own_paths,
        own_leaves,
        own_grads,
        pipeline.rule.state,
        grad_scale=grad_scale,
        lr_scale=lr_scale,
        path_factors=[math.prod((part.path_factor(path) for part in by_path), start=1.0) for path in own_paths],
        rounded=rounded,
        is_finite=gradients.is_finite,
    )


def _clip_factors(clips: Sequence[Link], gradients: Gradients) -> list[Tensor]:
    """The factor of each clip, to the last bit as its `update` has it."""
    factors: list[Tensor] = []
    for clip in clips:
        norms = torch.stack([tree.norm(_scaled(g, gradients.divisor, factors)) for g in gradients.leaves])
        factors = [*factors, clip.transform.gradient_factor(torch.linalg.vector_norm(norms))]
    return factors


def _scaled(g: Tensor, divisor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return reduce(lambda x, factor: x * factor.to(x.dtype), factors, g / divisor.to(g.dtype))


def _donate_slices(
    factors: Sequence[Tensor], pipeline: Pipeline, gradients: Gradients, paths: Sequence[str], leaves: Sequence[Tensor]
) -> None:
    """Take the step slice by slice, each written before the next is computed: `update` to the last bit."""
    update = Chain(tuple(link.transform for link in (pipeline.rule, *pipeline.tail))).update
    for places in update_in_slices(pipeline, leaves):
        # (place in the pipeline, elements) -> a slice of the whole tree, and one of the leaves that the rule knows
        in_tree = [Slice(pipeline.numbers[i], paths[pipeline.numbers[i]], start, end) for i, start, end in places]
        in_rule = in_tree
        if pipeline.is_part:
            in_rule = [part._replace(number=i) for part, (i, _, _) in zip(in_tree, places, strict=True)]
        params = {part.path: take_slice(leaves[part.number], part.start, part.end) for part in in_tree}
        grads = {part.path: take_slice(gradients.leaves[part.number], part.start, part.end) for part in in_tree}
        rule, tail = pipeline.rule, pipeline.tail
        state = (
            rule.transform.slice_state(rule.state, in_rule),
            *(link.transform.slice_state(link.state, in_tree) for link in tail),
        )

        updates, after = update(tree.map(lambda g: _scaled(g, gradients.divisor, factors), grads), state, params)
        new = tree.map(_added, params, updates), after
        if gradients.is_finite is not None:
            new = _select(gradients.is_finite, new, (params, state))
        tree.donate((params, state), new)


def update_in_slices(pipeline: Pipeline, leaves: Sequence[Tensor]) -> Iterator[list[tuple[int, int, int]]]:
    """What of a pipeline is updated at a time, as (place in the pipeline, start, end).

    One slice of a leaf if every transform is element-wise; else whole leaves, those of one shape together up to the limit.
    """
    own = [leaves[i] for i in pipeline.numbers]
    if is_elementwise(pipeline):
        for i, leaf in enumerate(own):
            n, limit = leaf.numel(), slice_limit(leaf.device)
            starts = [k * limit for k in range(max(1, n // limit))]
            yield from ([(i, start, end)] for start, end in zip(starts, [*starts[1:], n], strict=True))
        return
    shapes: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for i, leaf in enumerate(own):
        shapes.setdefault((leaf.shape, leaf.device), []).append(i)
    for (shape, device), members in shapes.items():
        n_together = max(1, slice_limit(device) // max(1, shape.numel()))
        for first in range(0, len(members), n_together):
            yield [(i, 0, shape.numel()) for i in members[first : first + n_together]]


def is_elementwise(pipeline: Pipeline) -> bool:
    """True if an element's update depends on no other element."""
    return all(link.transform.scope == "element" for link in (pipeline.rule, *pipeline.tail))


def _added(p: Tensor, u: Tensor) -> Tensor:
    return (p + u).to(p.dtype)
