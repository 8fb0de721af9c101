"""One step of an optimizer over a tree: what `update` defines, added to the parameters; AdamW's in one pass over memory."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune import tree
from minitune.grad import under_transform
from minitune.optim import (
    SGD,
    AdamState,
    AdamW,
    AdamW8bit,
    Chain,
    ClipByGlobalNorm,
    RoundStochastically,
    ScaleByGlob,
    ScaleBySchedule,
)
from minitune.optim8 import BLOCK, Moment8, stochastic_bfloat16
from minitune.tree import Tree

FUSED_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # that one fused call updates: all the memory that a donated step allocates
PIECE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # the same where an optimizer is not fused, and each of its terms takes as much


def advance(
    optimizer: Any,
    grads: Tree,
    state: Tree,
    params: Tree,
    *,
    divisor: Float[Tensor, ""],
    norm: Float[Tensor, ""],
    sound: Bool[Tensor, ""],
    donate: bool,
) -> tuple[Tree, Tree]:
    """(params, state) after one step on grads / divisor, whose norm is `norm`; as they were if not sound.

    With donate=True the new values are written over the old ones, piece by piece: optimizers of minitune then allocate nothing as
    large as the parameters.
    """
    if under_transform():  # a decision for each element of a batch, which no `if` can take
        updates, after = optimizer.update(tree.map(lambda g: g / divisor.to(g.dtype), grads), state, params)
        new = tree.map(lambda p, u: torch.where(sound, _added(p, u), p), params, updates)
        return new, tree.map(lambda old, new: torch.where(sound, new, old), state, after)
    if not sound:
        return params, state
    if _fuses(optimizer, state, tree.leaves(params), tree.leaves(grads)):
        params, state = (params, state) if donate else tree.map(torch.clone, (params, state))
        paths, p = zip(*tree.items(params), strict=True)
        _fused(optimizer, state, paths, p, tree.leaves(grads), divisor, norm)
        return params, state
    if donate and _splits(optimizer, state, params):
        _by_pieces(optimizer, grads, state, params, divisor)
        return params, state
    updates, after = optimizer.update(tree.map(lambda g: g / divisor.to(g.dtype), grads), state, params)
    new = tree.map(_added, params, updates)
    return (tree.donate(params, new), tree.donate(state, after)) if donate else (new, after)


def advance_each(
    optimizers: Sequence[Any],
    grads: Tree,
    states: Sequence[Tree],
    params: Tree,
    *,
    divisors: Float[Tensor, "n"],
    norms: Float[Tensor, "n"],
    sound: Bool[Tensor, "n"],
) -> None:
    """`advance` for each of n members of stacked trees, under its own optimizer and with its own state: written over both."""
    paths, leaves = zip(*tree.items(params), strict=True)
    own = zip(*(leaf.unbind() for leaf in leaves), strict=True)
    theirs = zip(*(leaf.contiguous().unbind() for leaf in tree.leaves(grads)), strict=True)  # one copy for all, where one is due
    for optimizer, state, p, g, divisor, norm, good in zip(optimizers, states, own, theirs, divisors, norms, sound, strict=True):
        if good and _fuses(optimizer, state, p, g):
            _fused(optimizer, state, paths, p, g, divisor, norm)
        elif good:
            trees = tree.rebuild(grads, g), state, tree.rebuild(params, p)
            advance(optimizer, *trees, divisor=divisor, norm=norm, sound=good, donate=True)


def scratch_bytes(optimizer: Any, params: Tree) -> int:
    """About how many bytes a donated step of minitune's optimizers allocates beside what it is given."""
    kinds = [type(part) for part in (optimizer.parts if isinstance(optimizer, Chain) else (optimizer,))]
    leaves, rounds = tree.leaves(params), RoundStochastically in kinds
    if AdamW in kinds:  # a scaled gradient, for 16 bits a wide one and a wide weight, for rounding three integers
        narrow = any(x.dtype == torch.bfloat16 for x in leaves)
        elements = min(sum(x.numel() for x in leaves), FUSED_ELEMENTS[leaves[0].device.type])
        return 4 * elements * (1 + 2 * narrow + 3 * (narrow and rounds))
    largest = max(x.numel() for x in leaves)
    return 4 * 8 * (largest if rounds else min(largest, 2 * PIECE_ELEMENTS[leaves[0].device.type]))  # moments, terms, the update


def donate_adamw(
    rule: AdamW,
    lr: Float[Tensor, ""],
    step: Float[Tensor, ""],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
) -> None:
    """Write over params, mu and nu their values after AdamW's step number `step` (from 1), by torch's one-pass kernel.

    Beside tree.donate the only writer of tensors, and like it only for memory that the caller gave away.
    """
    b1, b2 = rule.betas
    steps, rates = [step] * len(params), {"beta1": b1, "beta2": b2, "weight_decay": rule.weight_decay, "eps": rule.eps}
    lists = [list(params), list(grads), list(mu), list(nu), [], steps]
    with torch.no_grad():
        torch._fused_adamw_(*lists, lr=lr, **rates, amsgrad=False, maximize=False)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


def _parts(optimizer: Any, state: Tree) -> list[tuple[Any, Tree]]:
    return list(zip(optimizer.parts, state, strict=True)) if isinstance(optimizer, Chain) else [(optimizer, state)]


def _n_clips(parts: Sequence[tuple[Any, Tree]]) -> int:
    return next((i for i, (part, _) in enumerate(parts) if not isinstance(part, ClipByGlobalNorm)), len(parts))


def _fuses(optimizer: Any, state: Tree, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether the optimizer is clips, AdamW, factors and rounding, in this order, and its tensors are as torch's kernel takes
    them."""
    parts = _parts(optimizer, state)
    n_clips = _n_clips(parts)
    if n_clips == len(parts) or type(parts[n_clips][0]) is not AdamW:
        return False
    rest = [part for part, _ in parts[n_clips + 1 :]]
    factors = rest[:-1] if rest and isinstance(rest[-1], RoundStochastically) else rest
    if not all(isinstance(part, ScaleByGlob | ScaleBySchedule) for part in factors):
        return False
    adam = parts[n_clips][1]
    return all(_fits(*leaves) for leaves in zip(params, tree.leaves(adam.mu), tree.leaves(adam.nu), grads, strict=True))


def _fits(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> bool:
    kinds = {(p.dtype, g.dtype), (m.dtype, v.dtype)}
    kept = kinds == {(p.dtype, p.dtype)} or kinds == {(torch.bfloat16,) * 2, (torch.float32,) * 2}
    whole = p.shape == m.shape == v.shape == g.shape and p.is_contiguous() and m.is_contiguous() and v.is_contiguous()
    return kept and whole and p.device == m.device == v.device == g.device and p.device.type in FUSED_ELEMENTS


def _fused(
    optimizer: Any,
    state: Tree,
    paths: Sequence[str],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    divisor: Tensor,
    norm: Tensor,
) -> None:
    """Take the step where params and state lie: clips and the division scale the gradients, factors the learning rate."""
    scale, lr, globs, draws = 1 / divisor, torch.ones((), dtype=torch.float64, device=divisor.device), [], {}
    rule, adam = AdamW(lr=0.0), AdamState(divisor, (), ())
    for part, own in _parts(optimizer, state):
        if isinstance(part, ClipByGlobalNorm):
            factor = part.factor(norm)
            scale, norm = scale * factor, norm * factor
        elif isinstance(part, AdamW):
            rule, adam = part, own._replace(step=tree.donate(own.step, own.step + 1))
        elif isinstance(part, ScaleByGlob):
            globs = [*globs, part]
        elif isinstance(part, RoundStochastically):
            draws = {path: part.generator(int(own), path) for path in paths}
            tree.donate(own, own + 1)
        else:
            lr = lr * part.schedule.factor(own, part.total_steps)
            tree.donate(own, own + 1)
    groups: dict[Any, list[list[tuple[Any, ...]]]] = {}
    room: dict[Any, int] = {}  # in each group's last chunk
    for path, *leaves in zip(paths, params, grads, tree.leaves(adam.mu), tree.leaves(adam.nu), strict=True):
        limit = FUSED_ELEMENTS[leaves[0].device.type]
        group = (math.prod([part.factor(path) for part in globs]), leaves[0].dtype, leaves[0].device)
        chunks = groups.setdefault(group, [])
        for piece in zip(*(x.reshape(-1).split(limit) for x in leaves), strict=True):
            if room.get(group, 0) < piece[0].numel():
                room[group] = limit
                chunks.append([])
            room[group] -= piece[0].numel()
            chunks[-1].append((*piece, draws.get(path)))
    for (factor, _, device), chunks in groups.items():
        rate, step = ((rule.lr * factor * lr).to(device, torch.float32), adam.step.to(device, torch.float32))
        for chunk in chunks:
            p, g, m, v, drawn = zip(*chunk, strict=True)
            wide = [x.to(y.dtype) for x, y in zip(p, m, strict=True)]  # itself, but where weights of 16 bits have wider moments
            g = [x.to(y.dtype) for x, y in zip(g, m, strict=True)]
            donate_adamw(rule, rate, step, wide, torch._foreach_mul(g, scale.to(device, m[0].dtype)), m, v)  # pyright: ignore[reportPrivateImportUsage]
            if p[0].dtype != m[0].dtype:
                pairs = zip(wide, drawn, strict=True)
                tree.donate(p, tuple(x if by is None else stochastic_bfloat16(x, by) for x, by in pairs))


def _splits(optimizer: Any, state: Tree, params: Tree) -> bool:
    """Whether the optimizer is clips and then what sees one element at a time: pieces of leaves can take their steps alone."""
    parts = _parts(optimizer, state)
    kinds = [type(part) for part, _ in parts[_n_clips(parts) :]]
    alone = kinds[:-1] if kinds[-1:] == [RoundStochastically] else kinds
    known = all(kind in (AdamW, AdamW8bit, SGD, ScaleByGlob, ScaleBySchedule) for kind in alone)
    return known and all(x.is_contiguous() for x in tree.leaves((params, state)))


def _by_pieces(optimizer: Any, grads: Tree, state: Tree, params: Tree, divisor: Tensor) -> None:
    """Take the step where params and state lie, each piece written before the next is computed: `update` to the last bit."""
    parts = _parts(optimizer, state)
    rest, factors = parts[_n_clips(parts) :], []

    def scaled(g: Tensor) -> Tensor:
        return reduce(lambda x, factor: x * factor.to(x.dtype), factors, g / divisor.to(g.dtype))

    for part, _ in parts[: len(parts) - len(rest)]:
        norms = torch.stack([tree.norm(scaled(g)) for g in tree.leaves(grads)])
        factors = [*factors, part.factor(torch.linalg.vector_norm(norms))]
    own, draws = (), any(isinstance(part, RoundStochastically) for part, _ in rest)  # a leaf's draws are one sequence
    for i, ((path, p), g) in enumerate(zip(tree.items(params), tree.leaves(grads), strict=True)):
        n, limit, g = p.numel(), PIECE_ELEMENTS[p.device.type], g.reshape(-1)
        starts = [0] if draws else [k * limit for k in range(max(1, n // limit))]
        for a, b in zip(starts, [*starts[1:], n], strict=True):
            own = tuple(_cut(part, part_state, i, path, a, b) for part, part_state in rest)
            here = {path: p.view(-1)[a:b]}
            updates, after = Chain(tuple(part for part, _ in rest)).update({path: scaled(g[a:b])}, own, here)
            tree.donate((here, own), (tree.map(_added, here, updates), after))
    for (part, part_state), new in zip(rest, own, strict=True):
        if not isinstance(part, SGD):
            old, new = (x.step if isinstance(x, AdamState) else x for x in (part_state, new))
            tree.donate(old, new)


def _cut(part: Any, state: Tree, i: int, path: str, a: int, b: int) -> Tree:
    """A part's state for elements a .. b of leaf i, where it lies, but for counts, of which every piece needs the old ones."""

    def cut(x: Any) -> Any:
        return Moment8(*(y[a // BLOCK : -(-b // BLOCK)] for y in x)) if isinstance(x, Moment8) else x.view(-1)[a:b]

    if isinstance(part, AdamW8bit):
        return AdamState(state.step.clone(), [cut(state.mu[i])], [cut(state.nu[i])])
    if isinstance(part, AdamW):
        return AdamState(state.step.clone(), *({path: cut(tree.leaves(x)[i])} for x in (state.mu, state.nu)))
    return {path: cut(tree.leaves(state)[i])} if isinstance(part, SGD) else tree.map(torch.clone, state)


def _added(p: Tensor, u: Tensor) -> Tensor:
    return (p + u).to(p.dtype)
