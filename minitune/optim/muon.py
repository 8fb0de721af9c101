"""Muon: steps along orthogonalized momentum for matrices, AdamW for everything else."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from minitune import hardware, tree
from minitune.errors import InputError
from minitune.optim.adamw import AdamW
from minitune.optim.partition import Branch, Partition
from minitune.optim.transforms import Scope, Slice, slice_limit, slice_tree, wide_zeros
from minitune.structs import CheckedStruct
from minitune.tree import Tree
from minitune.types import Epsilon, Fraction, NonNegativeFloat

# of the quintic, chosen for its slope at zero (Jordan et al. 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7  # that a matrix is divided by
# matrices that are looked up in or classify, and not hidden layers
TABLES = ("*embed_tokens*", "*lm_head*")
AdjustLr = Literal["match_rms_adamw", "original"]


class Muon(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag="muon", tag_field="kind"):
    """Momentum, orthogonalized, for the 2-D weights of hidden layers (Jordan et al. 2024, "Muon: an
    optimizer for hidden layers in neural networks"); AdamW for the rest: norms, biases, embeddings,
    the head, weights of any other rank.

    The a and b of a LoRA delta are matrices like any other, and belong with their weight: those of
    an embedding or of the head take AdamW. `adamw` names by globs which leaves take AdamW whatever
    their rank, in place of embeddings and head.

    With adjust_lr_fn = "match_rms_adamw" a step is as long as one of AdamW, so that one lr serves
    both (Liu et al. 2025, arXiv 2502.16982, eq. 4). "original" is the default of torch.optim.Muon;
    AdamW then wants a smaller rate: adamw_lr_factor.
    """

    lr: NonNegativeFloat  # learning rate at the schedule's peak, of the matrices
    momentum: Fraction = 0.95  # share of the mean gradient that a step keeps: more averages longer
    nesterov: bool = True  # look one step ahead along the momentum
    # iterations of Newton and Schulz: more are nearer to orthogonal, and slower
    ns_steps: Annotated[int, Meta(ge=1, lt=100)] = 5
    # each step takes lr * weight_decay off a weight, as a share of it; in AdamW too
    weight_decay: NonNegativeFloat = 0.0
    # match_rms_adamw: steps as long as AdamW's, so that one lr serves both; original: those of
    # torch.optim.Muon's default
    adjust_lr_fn: AdjustLr = "match_rms_adamw"
    # globs of the matrices that take AdamW; embeddings and head if absent
    adamw: tuple[str, ...] | None = None
    adamw_lr_factor: NonNegativeFloat = 1.0  # learning rate of AdamW, in units of lr
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # of AdamW: what its two means keep at a step
    eps: Epsilon = 1e-8  # of AdamW: added to the root of the mean square

    def init(self, params: Tree) -> tuple[Tree, ...]:
        """State of the matrices, then that of AdamW; InputError for no matrix, and for a glob
        that matches no leaf.
        """
        paths = [path for path, _ in tree.items(params)]
        if self.adamw:
            tree.select(paths, self.adamw, "optim: muon.adamw")
        if all(self._choose(path, leaf) for path, leaf in tree.items(params)):
            raise InputError(
                f"optim: muon finds no matrix to update among {len(paths)} trained leaves "
                f"({', '.join(paths[:3])}, ...), expected a 2-D weight of a hidden layer; use kind "
                "= 'adamw'"
            )
        return self.partitioned().init(params)

    def update(
        self, grads: Tree, state: Sequence[Tree], params: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        """OrthogonalizedMomentum's update of matrices, AdamW's of the rest."""
        return self.partitioned().update(grads, state, params)

    def branches(
        self, state: Sequence[Tree], paths: Sequence[str], leaves: Sequence[Tensor]
    ) -> list[Branch]:
        """Matrices, and the rest."""
        return self.partitioned().branches(state, paths, leaves)

    def partitioned(self) -> Partition:
        """Rule of the matrices, then that of the rest, and which leaf goes to which."""
        matrices = OrthogonalizedMomentum(
            self.lr,
            self.momentum,
            self.nesterov,
            self.ns_steps,
            self.weight_decay,
            self.adjust_lr_fn,
        )
        rest = AdamW(self.lr * self.adamw_lr_factor, self.betas, self.eps, self.weight_decay)
        return Partition((matrices, rest), self._choose)

    def _choose(self, path: str, leaf: Tensor) -> int:
        """0 for a matrix that is orthogonalized, 1 for AdamW."""
        globs = TABLES if self.adamw is None else self.adamw
        return int(leaf.ndim != 2 or any(fnmatchcase(path, glob) for glob in globs))


class OrthogonalizedMomentum(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Muon's rule for a tree of matrices; its state is their momentum, in float32 or wider."""

    scope: ClassVar[Scope] = "leaf"
    lr: NonNegativeFloat
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: NonNegativeFloat = 0.0
    adjust_lr_fn: AdjustLr = "match_rms_adamw"

    def init(self, params: Tree) -> Tree:
        """Zero momentum."""
        return tree.map(wide_zeros, params)

    def update(self, grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        """-lr * adjust * orthogonalized(m) - lr * weight_decay * p, with m = momentum * m + (1 -
        momentum) * g.

        With nesterov momentum * m + (1 - momentum) * g is orthogonalized, where m is the new one.
        """
        grads = tree.map(lambda m, g: g.to(m.dtype), state, grads)
        state = tree.map(lambda m, g: torch.lerp(m, g, 1 - self.momentum), state, grads)
        ahead = (
            tree.map(lambda m, g: torch.lerp(g, m, self.momentum), state, grads)
            if self.nesterov
            else state
        )
        directions = tree.rebuild(ahead, orthogonalized(tree.leaves(ahead), self.ns_steps))

        def leaf(direction: Tensor, p: Tensor) -> Tensor:
            rate = self.lr * self.lr_adjustment(p.shape)
            return -rate * direction - (self.lr * self.weight_decay) * p

        return tree.map(leaf, directions, params), state

    def lr_adjustment(self, shape: torch.Size) -> float:
        """sqrt(max(1, A / B)) for [A, B], or 0.2 sqrt(max(A, B)), which gives an update the root
        mean square of AdamW's.
        """
        n_out, n_in = shape
        if self.adjust_lr_fn == "original":
            return math.sqrt(max(1, n_out / n_in))
        return 0.2 * math.sqrt(max(n_out, n_in))

    def slice_state(self, state: Tree, slices: Sequence[Slice]) -> dict[str, Tensor]:
        """Momentum of these matrices."""
        return slice_tree(tree.leaves(state), slices)

    def counts(self, state: Tree) -> tuple[()]:
        """None: a step does not depend on how many were taken."""
        return ()

    def scratch_bytes(self, leaves: Sequence[Tensor], *, rounds: bool) -> int:
        """Seven numbers an element of the matrices that go together, or more where they are nearly
        square.

        Gradient, momentum, what is orthogonalized, its copy and two iterates live beside two
        products [short, short]; afterwards gradient, momentum, direction, its two terms, update and
        new parameter do.
        """
        limit = slice_limit(leaves[0].device)

        def n_numbers(leaf: Tensor) -> int:
            n_together = max(
                1, min(limit // leaf.numel(), sum(x.shape == leaf.shape for x in leaves))
            )
            during: int = 6 * leaf.numel() + 2 * min(leaf.shape) ** 2
            after = 7 * leaf.numel()
            if rounds:  # the wide copy of what was in bfloat16 lives beside them
                during, after = during + leaf.numel(), after + leaf.numel()
            return n_together * max(during, after)

        return 4 * max(n_numbers(leaf) for leaf in leaves)


def orthogonalized(
    matrices: Sequence[Float[Tensor, "A B"]], n_steps: int
) -> list[Float[Tensor, "A B"]]:
    """For each matrix U S V^T nearly U V^T: singular values between about 0.7 and 1.2. Those of one
    shape go together.

    Products are of bfloat16 where the hardware multiplies it, as in torch.optim.Muon, else of
    float32; of float64 for float64.
    """
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(matrices):
        groups.setdefault((x.shape, x.dtype, x.device), []).append(i)

    results = list(matrices)
    for (shape, dtype, device), numbers in groups.items():
        narrow = dtype != torch.float64 and hardware.multiplies_bfloat16(device)
        batch = torch.stack([matrices[i].to(torch.bfloat16 if narrow else dtype) for i in numbers])
        is_tall = shape[0] > shape[1]
        batch = newton_schulz(batch.mT if is_tall else batch, n_steps).to(dtype)
        for i, direction in zip(numbers, (batch.mT if is_tall else batch).unbind(), strict=True):
            results[i] = direction
    return results


def newton_schulz(x: Float[Tensor, "n A B"], n_steps: int) -> Float[Tensor, "n A B"]:
    """n_steps of X <- a X + b (X X^T) X + c (X X^T)^2 X, which takes all singular values near 1
    (Jordan et al. 2024).

    It starts from x divided by its Frobenius norm, because it converges where no singular value is
    above 1.
    """
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
