"""Trees of tensors: dict, tuple, list and NamedTuple, with None as the empty tree.

Everything that minitune trains, differentiates or saves is such a tree. A path names a leaf as it
would be written in a table: `mu.model.layers.0.mlp.up_proj.weight.a`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeAliasType

from minitune.errors import InputError, closest
from minitune.types import Params, Trainable, wide_dtype

SUM_ELEMENTS = 2**18  # that are added up at a time
# Tensor | None | Mapping[str, Tree] | tuple[Tree, ...] | list[Tree] | NamedTuple of Tree
Tree = TypeAliasType("Tree", Any)


def items(tree: Tree, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, leaf) in storage order; TypeError names the path of anything that is neither
    tensor nor container.
    """
    if isinstance(tree, Tensor):
        yield path, tree
    elif tree is not None:
        for key, child in _children(tree, path):
            yield from items(child, f"{path}.{key}" if path else key)


def leaves(tree: Tree) -> list[Tensor]:
    """Tensors of a tree, in storage order."""
    # not through `items`: writing paths takes longer than a step on small tensors
    if isinstance(tree, dict | tuple | list):
        children = tree.values() if isinstance(tree, dict) else tree
        try:
            return [
                leaf
                for child in children
                for leaf in ([child] if isinstance(child, Tensor) else leaves(child))
            ]
        except TypeError:
            pass
    return [leaf for _, leaf in items(tree)]


def map(f: Callable[..., Any], tree: Tree, *rest: Tree, path: str = "") -> Tree:
    """Apply f to corresponding leaves; TypeError names the path where two trees differ in
    structure.
    """
    if isinstance(tree, Tensor):
        for other in rest:
            if not isinstance(other, Tensor):
                raise TypeError(
                    f"tree: {path or 'root'} is a tensor in one tree and {type(other).__name__} "
                    "in another"
                )
        return f(tree, *rest)
    if tree is None:
        if any(other is not None for other in rest):
            raise TypeError(
                f"tree: {path or 'root'} is None in one tree, expected the same in the others"
            )
        return None
    children = _children(tree, path)
    for other in rest:
        if [key for key, _ in _children(other, path)] != [key for key, _ in children]:
            other_kind, kind = _describe(other), _describe(tree)
            raise TypeError(
                f"tree: {path or 'root'} is {other_kind} in one tree, expected {kind} as in the "
                "first"
            )
    mapped = [
        map(
            f,
            child,
            *(_child(other, i, path) for other in rest),
            path=f"{path}.{key}" if path else key,
        )
        for i, (key, child) in enumerate(children)
    ]
    return _like(tree, mapped)


def rebuild(tree: Tree, new_leaves: Iterable[Tensor]) -> Tree:
    """Tree of the same structure with other leaves, given in storage order; TypeError if there are
    too few or too many.
    """
    pending = iter(new_leaves)

    def take(_: Tensor) -> Tensor:
        try:
            return next(pending)
        except StopIteration:
            raise TypeError(
                f"tree: fewer leaves than the {len(leaves(tree))} that the structure holds"
            ) from None

    built = map(take, tree)
    if next(pending, None) is not None:
        raise TypeError(f"tree: more leaves than the {len(leaves(tree))} that the structure holds")
    return built


def add(x: Tree, y: Tree) -> Tree:
    """Leafwise x + y."""
    return map(torch.add, x, y)


def norm(tree: Tree) -> Float[Tensor, ""]:
    """Euclidean norm over all leaves together, accumulated in float32; TypeError for a tree without
    leaves.
    """
    return torch.linalg.vector_norm(norms(tree))


def norms(tree: Tree) -> Float[Tensor, "leaves"]:
    """Euclidean norm of each leaf, accumulated in float32; TypeError for a tree without leaves."""
    parts = [torch.linalg.vector_norm(leaf, dtype=wide_dtype(leaf.dtype)) for leaf in leaves(tree)]
    if not parts:
        raise TypeError("tree: norm of a tree without leaves, expected at least one tensor")
    return torch.stack(parts)


def first_not_finite(norms: Float[Tensor, "leaves *adapters"]) -> Int[Tensor, "*adapters"]:
    """Number of the first leaf whose norm is not finite, in storage order; -1 if all are finite."""
    bad = ~torch.isfinite(norms)
    return torch.where(bad.any(0), bad.int().argmax(0), -1)


def n_bytes(tree: Tree) -> int:
    """Bytes of all leaves together, each counted as if it owned its storage."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


def select(names: Iterable[str], globs: Sequence[str], what: str) -> list[str]:
    """Names that match any glob, in their own order; InputError for no glob, and for one that
    matches nothing.

    `*` also crosses dots, so `*.mlp.*_proj.weight` reaches every layer. `what` names the asking
    rule in the message.
    """
    names = list(names)
    if not globs:
        raise InputError(
            f"{what}: the list of globs is empty, expected at least one such as "
            "'*.mlp.*_proj.weight'"
        )
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = _near(glob, names)
            raise InputError(f"{what}: {glob!r} matches no weight; the nearest are {near}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _near(glob: str, names: Sequence[str]) -> str:
    """Names that a glob may have meant, those whose segments resemble its own first, and a glob
    that finds them.
    """
    segments = dict.fromkeys(part for name in names for part in name.split("."))
    words = [word for word in re.split(r"[.*?]+", glob) if word and word != "weight"]
    meant = [closest(word, [*segments], 1, cutoff=0.6) for word in words]
    last = meant[-1][0] if words and meant[-1] else None
    alike = [name for name in names if last in name.split(".")] or [*names]
    near = ", ".join(closest(glob, alike, 3, cutoff=0.3) or alike[:3])
    if glob == "all-linear" and any(name.endswith("_proj.weight") for name in names):  # PEFT's word
        return f"{near}; write '*_proj.weight'"
    if last is None or "*" in glob:
        return near
    _, _, rest = alike[0].rpartition(last)
    return f"{near}; write '*.{last}{rest}'"


def donate(old: Tree, new: Tree, *, non_blocking: bool = False) -> Tree:
    """Write the leaves of `new` over those of `old` and return `old`: this, donate_at and
    donate_sum are where minitune writes.

    Only for memory that the caller gave away: a step with donate=True. non_blocking: a copy to
    pinned memory is queued on its device, and the caller waits for it before it reads `old`.
    """
    with torch.no_grad():
        return map(lambda x, y: x.copy_(y, non_blocking=non_blocking), old, new)


def donate_at(old: Tree, index: Int[Tensor, "n"], new: Tree, *, dim: int) -> Tree:
    """Write the leaves of `new` over places `index` of dimension dim of those of `old` and return
    `old`.

    Only for memory that the caller gave away: a key/value cache. The index is a tensor, so that one
    compiled step serves all.
    """
    with torch.no_grad():
        return map(lambda x, y: x.index_copy_(dim, index, y), old, new)


def donate_sum(old: Tree, new: Tree) -> Tree:
    """Add the leaves of `new` to those of `old`, which may be views of a part of some tensor, and
    return `old`.

    Only for memory that the caller gave away: a sum that is being made.
    """

    def added(x: Tensor, y: Tensor) -> Tensor:
        # where dtypes differ, torch's CPU kernel begins by making the whole of y as wide as x
        n_rows = (
            len(x) if x.dtype == y.dtype else max(1, SUM_ELEMENTS * len(x) // max(1, x.numel()))
        )
        for some, more in zip(x.split(n_rows), y.split(n_rows), strict=True):
            some.add_(more)
        return x

    with torch.no_grad():
        return map(added, old, new)


def _children(tree: Tree, path: str) -> list[tuple[str, Tree]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, (tuple, list)):
        return list(
            zip(getattr(tree, "_fields", [str(i) for i in range(len(tree))]), tree, strict=True)
        )
    raise TypeError(
        f"tree: {path or 'root'} is a {type(tree).__name__}, expected a tensor, dict, tuple or None"
    )


def _child(tree: Tree, i: int, path: str) -> Tree:
    return _children(tree, path)[i][1]


def _describe(tree: Tree) -> str:
    keys = (
        [key for key, _ in _children(tree, "")] if isinstance(tree, (Mapping, tuple, list)) else []
    )
    shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"{type(tree).__name__} of {len(keys)} ({shown})"


def _like(tree: Tree, children: list[Tree]) -> Tree:
    if isinstance(tree, Mapping):
        return dict(zip(tree, children, strict=True))
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def device_of(params: Params, trainable: Trainable) -> torch.device:
    """Device that a model lives on; weights that train whole are on the meta device in params."""
    return next(
        (leaf.device for leaf in leaves((params, trainable)) if not leaf.is_meta),
        torch.device("cpu"),
    )
