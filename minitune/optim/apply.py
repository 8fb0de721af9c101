"""One step of an optimizer over a tree of parameters: the one place that writes them.

What `update` defines is added to the parameters. An optimizer that declares how it can be cut
(transforms.py) is applied slice by slice, or by a kernel of its own, where parameters and state
lie (donated.py); any other by its definition.

On a device that works asynchronously nothing here waits for it: a step that is not finite is
computed and not selected.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import hardware, tree
from minitune.autodiff.value_and_grad import under_transform
from minitune.optim.donated import (
    Gradients,
    donate_step,
    scaled_gradient,
    where_finite,
)
from minitune.optim.pipeline import (
    is_sliceable,
    split_optimizer,
)
from minitune.optim.transforms import GradientTransformation, checked_update
from minitune.tree import Tree
from minitune.types import widen


@hardware.profiled("optimizer")
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
    """(params, state) after a step on grads / divisor, of norm `norm`; as before if not is_finite.

    With donate=True the new values are written over the old ones, slice by slice: optimizers of
    minitune then allocate nothing as large as the parameters.
    """
    if under_transform():  # a decision for each element of a batch, which no `if` can take
        new = _by_definition(optimizer, grads, state, params, divisor)
        return where_finite(is_finite, new, (params, state))
    # a graph of torch.compile has neither decisions nor kernels that write over their arguments
    is_traced = torch.compiler.is_compiling()
    selects = is_traced or hardware.is_asynchronous(divisor.device)
    if not selects and not is_finite:
        return tree.map(Tensor.detach, params), state

    paths, leaves = zip(*tree.items(params), strict=True)
    clips, pipelines = split_optimizer(optimizer, state, paths, leaves)
    if not is_traced and is_sliceable(pipelines, leaves):
        if not donate:
            params, state = tree.map(lambda x: x.detach().clone(), (params, state))
            leaves = tree.leaves(params)
            clips, pipelines = split_optimizer(optimizer, state, paths, leaves)
        gradients = Gradients(tree.leaves(grads), divisor, norm, is_finite if selects else None)
        donate_step(clips, pipelines, gradients, paths, leaves)
        return params, state

    new = _by_definition(optimizer, grads, state, params, divisor)
    is_finite = is_finite & _has_finite_updates(new[0], params, names_leaf=not selects)
    new = where_finite(is_finite, new, (params, state)) if selects else new
    return tree.donate((params, state), new) if donate else new


@hardware.profiled("optimizer")
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
            donate_step(clips, pipelines, gradients, paths, member_params)
            continue
        trees = tree.rebuild(grads, member_grads), state, tree.rebuild(params, member_params)
        own = {"divisor": divisor[i], "norm": norm[i], "is_finite": is_finite[i]}
        apply_gradients(optimizer, *trees, **own, donate=True)


def scratch_bytes(optimizer: GradientTransformation, state: Tree, params: Tree) -> int:
    """About how many bytes a donated step allocates beside what it is given; by definition, three
    trees like params.
    """
    paths, leaves = zip(*tree.items(params), strict=True)
    _, pipelines = split_optimizer(optimizer, state, paths, leaves)
    if not is_sliceable(pipelines, leaves):
        return 3 * tree.n_bytes(params)
    sizes = []
    for pipeline in pipelines:
        rounds = any(hasattr(link.transform, "rounding_after") for link in pipeline.tail)
        members = [leaves[i] for i in pipeline.numbers]
        sizes.append(pipeline.rule.transform.scratch_bytes(members, rounds=rounds))
    return max(sizes)


def _by_definition(
    optimizer: GradientTransformation, grads: Tree, state: Tree, params: Tree, divisor: Tensor
) -> tuple[Tree, Tree]:
    """(params, state) after the step, as new trees."""
    divided = tree.map(lambda g: scaled_gradient(g, divisor, ()), grads)
    updates, after = checked_update(optimizer, divided, state, params)
    # inside a transform, which may differentiate a step, the parameters keep their tangents
    held = params if under_transform() else tree.map(Tensor.detach, params)
    return tree.map(lambda p, u: (p + u).to(p.dtype), held, updates), after


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
