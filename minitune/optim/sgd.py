"""Gradient descent with momentum."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from minitune import tree
from minitune.optim.transforms import Scope, Slice, slice_scratch_bytes, slice_tree, wide_zeros
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import Fraction, NonNegativeFloat


class SGD(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag="sgd", tag_field="kind"):
    """Gradient descent with momentum, and weight decay in the gradient (Sutskever et al. 2013, eq.
    1-4, as torch.optim.SGD).
    """

    scope: ClassVar[Scope] = "element"
    lr: NonNegativeFloat  # learning rate at the schedule's peak
    # share of the last step's direction that is kept: more averages longer
    momentum: Fraction = 0.0
    nesterov: bool = False  # look one step ahead along the momentum
    weight_decay: NonNegativeFloat = 0.0  # this share of a weight is added to its gradient

    def init(self, params: Tree) -> Tree:
        """Zero momentum, in float32 or wider."""
        return tree.map(wide_zeros, params)

    def update(self, grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        """-lr * m, with m = momentum * m + g; nesterov looks one step ahead: -lr * (g + momentum *
        m).
        """

        def decayed(m: Tensor, g: Tensor, p: Tensor) -> Tensor:
            return g.to(m.dtype) + self.weight_decay * p.to(m.dtype)

        grads = tree.map(decayed, state, grads, params)
        state = tree.map(lambda m, g: self.momentum * m + g, state, grads)
        ahead = (
            tree.map(lambda m, g: g + self.momentum * m, state, grads) if self.nesterov else state
        )
        return tree.map(lambda m: -self.lr * m, ahead), state

    def slice_state(self, state: Tree, slices: Sequence[Slice]) -> dict[str, Tensor]:
        """Momentum of these slices."""
        return slice_tree(tree.leaves(state), slices)

    def counts(self, state: Tree) -> tuple[()]:
        """None: a step does not depend on how many were taken."""
        return ()

    def scratch_bytes(self, leaves: Sequence[Tensor], *, rounds: bool) -> int:
        """Up to five float32 numbers an element of a slice: gradient, momentum, what is ahead,
        update, new parameter.

        Rounding adds three: wide copies of gradient and parameter, and draws.
        """
        return slice_scratch_bytes(leaves, 20 + 12 * rounds, rounds=rounds)
