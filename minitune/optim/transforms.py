"""Interface of gradient transforms, what they may declare about themselves, and those that only
rescale gradients.

A transform needs `init` and `update`, and is then applied as they define it: the updates of the
whole tree exist at once. It takes less memory and time if it declares what it can do. `apply.py`
asks for these declarations and never for a type:

    scope                   "element" or "leaf": an element's update depends on no more than that
    element, or than its leaf slice_state, counts     (with scope) the part of its state that
    belongs to some slices of leaves, and its step counts gradient_factor(norm)   its update is the
    gradient times this factor, which depends on the gradient's norm alone path_factor(path)
    its update is the incoming update times this factor
    step_factor(state)      its update is the incoming update times this factor, which depends on
    its step count alone fused_update(...)       it has a kernel that writes parameters and state in
    one pass (see adamw.py) rounding_after(step)    it ends a chain by rounding what parameters
    become (see rounding.py) branches(...)           it gives the leaves to several transforms (see
    partition.py) scratch_bytes(leaves, rounds=)   memory that a donated step allocates beside its
    arguments
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitune import tree
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import NonNegativeFloat, PositiveFloat, wide_dtype

Scope = Literal["element", "leaf"]
# elements updated at a time without a fused kernel
SLICE_ELEMENTS = {"cpu": 2**18, "accelerator": 2**24}


@runtime_checkable
class GradientTransformation(Protocol):
    """Optimizer, or a part of one: a pure function of gradients with a state of its own."""

    def init(self, params: Tree) -> Tree:
        """State before the first step."""
        ...

    def update(self, grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        """(updates, next state); the updates are added to params, or given to the next transform of
        a chain.
        """
        ...


def checked_update(
    optimizer: GradientTransformation, grads: Tree, state: Tree, params: Tree
) -> tuple[Tree, Tree]:
    """(updates, next state) of an optimizer; TypeError for what is no such pair, and for an update
    of another shape than its parameter, which would broadcast.
    """
    result = optimizer.update(grads, state, params)
    found = f"optim: update of {type(optimizer).__name__} returned"
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{found} a {type(result).__name__}, expected (updates, state)")
    updates, _ = result
    tree.map(lambda p, u: None, params, updates)  # the same names, or an error that says which
    for (path, p), u in zip(tree.items(params), tree.leaves(updates), strict=True):
        if u.shape != p.shape:
            raise TypeError(
                f"{found} {list(u.shape)} for {path or 'the root'}, expected the shape of the "
                f"parameter, {list(p.shape)}"
            )
    return result


class Slice(NamedTuple):
    """Elements start .. end of leaf `number`, counted over the flattened leaf."""

    number: int
    path: str
    start: int
    end: int


def take_slice(x: Tensor, start: int, end: int) -> Tensor:
    """Elements start .. end of the flattened x; a whole leaf keeps its shape."""
    return x if end - start == x.numel() else x.reshape(-1)[start:end]


def slice_tree(leaves: Sequence[Tensor], slices: Sequence[Slice]) -> dict[str, Tensor]:
    """Slices of these leaves, by the path of each leaf."""
    return {part.path: take_slice(leaves[part.number], part.start, part.end) for part in slices}


def slice_limit(device: torch.device) -> int:
    """Number of elements that are updated at a time on this device."""
    return SLICE_ELEMENTS["cpu" if device.type == "cpu" else "accelerator"]


def slice_scratch_bytes(leaves: Sequence[Tensor], bytes_per_element: int, *, rounds: bool) -> int:
    """Memory of an element-wise step that goes slice by slice, given what its largest moment takes
    an element.

    A step that rounds at random goes leaf by leaf, and its rounding takes 24 bytes an element.
    """
    if rounds:
        return max(bytes_per_element, 24) * max(x.numel() for x in leaves)
    limit = slice_limit(leaves[0].device)
    # the last slice of a leaf has all that is left, less than two limits
    return bytes_per_element * max(min(x.numel(), limit + x.numel() % limit) for x in leaves)


class ClipByGlobalNorm(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Scale the whole gradient so that its norm is at most max_norm (Pascanu et al. 2013, arXiv
    1211.5063, algorithm 1).
    """

    max_norm: PositiveFloat

    def init(self, params: Tree) -> tuple[()]:
        """No state."""
        return ()

    def update(self, grads: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        """g * gradient_factor(|g|)."""
        scale = self.gradient_factor(tree.norm(grads))
        return tree.map(lambda g: g * scale.to(g.dtype), grads), ()

    def gradient_factor(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """min(1, max_norm / (norm + 1e-6)), the small term as in torch.nn.utils.clip_grad_norm_."""
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)


class ScaleByGlob(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Multiply updates by a factor of their own: learning-rate groups, as globs over the paths of
    leaves. The first match wins.

    {"*.b": 16.0} is LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4.1); {"*norm.weight": 0.0}
    holds the norms still.
    """

    scope: ClassVar[Scope] = "element"
    factors: dict[str, NonNegativeFloat]

    def init(self, params: Tree) -> tuple[()]:
        """No state; InputError for a glob that matches no leaf."""
        tree.select(
            [path for path, _ in tree.items(params)], list(self.factors), "optim: lr factor"
        )
        return ()

    def update(self, grads: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        """u * path_factor(path)."""
        return tree.rebuild(
            grads, [self.path_factor(path) * g for path, g in tree.items(grads)]
        ), ()

    def path_factor(self, path: str) -> float:
        """Factor of the first glob that matches the path; 1 if none does."""
        return next(
            (factor for glob, factor in self.factors.items() if fnmatchcase(path, glob)), 1.0
        )

    def slice_state(self, state: tuple[()], slices: Sequence[Slice]) -> tuple[()]:
        """No state."""
        return ()

    def counts(self, state: tuple[()]) -> tuple[()]:
        """None."""
        return ()


class Chain(NamedTuple):
    """Transforms applied one after the other."""

    parts: tuple[GradientTransformation, ...]

    def init(self, params: Tree) -> tuple[Tree, ...]:
        """Each part's state."""
        return tuple(part.init(params) for part in self.parts)

    def update(
        self, grads: Tree, state: Sequence[Tree], params: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        """Feed each part's updates to the next."""
        states = []
        for part, part_state in zip(self.parts, state, strict=True):
            grads, new = part.update(grads, part_state, params)
            states.append(new)
        return grads, tuple(states)

    def links(self, state: Sequence[Tree]) -> list[tuple[GradientTransformation, Tree]]:
        """Each part with its state, in order."""
        return list(zip(self.parts, state, strict=True))


def chain(*parts: GradientTransformation) -> Chain:
    """Compose transforms: chain(ClipByGlobalNorm(1.0), AdamW(lr=1e-3))."""
    return Chain(parts)


def zero_count(params: Tree) -> Int[Tensor, ""]:
    """No step taken yet, on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)


def wide_zeros(x: Tensor) -> Tensor:
    """Zeros in the shape of x, in float32 or wider."""
    # on the meta device, where a check runs this, zeros_like would import sympy
    return x.new_zeros(x.shape, dtype=wide_dtype(x.dtype))
