"""Low-rank adaptation: a rule that makes, scales and merges deltas. It never touches the model it
adapts.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from minitune import seeds, tree
from minitune.errors import InputError
from minitune.nn.linear import row_norms
from minitune.sharding.gather import gather
from minitune.structs import CheckedStruct
from minitune.types import (
    Adapted,
    Delta,
    Deltas,
    Fraction,
    Params,
    PositiveFloat,
    PositiveInt,
    Trainable,
    wide_dtype,
)

# what deltas are merged onto: the weights they trained on, or the dense ones on disk
Onto = Literal["trained", "stored"]


class MergedWeight(NamedTuple):
    """Weight with its delta merged in, and the share of its change that was lost."""

    weight: Float[Tensor, "*experts out in"]
    error: Float[Tensor, ""]


class Lora(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """W' = W + s b a on every weight that a target glob matches (Hu et al. 2021, arXiv 2106.09685,
    eq. 3), or, with dora, m * (W + s b a) / |W + s b a| by rows (Liu et al. 2024, arXiv 2402.09353,
    eq. 5).
    """

    rank: PositiveInt
    alpha: PositiveFloat
    targets: tuple[str, ...]
    # glob -> another rank for the targets that it matches; the first match wins
    ranks: dict[str, PositiveInt] = msgspec.field(default_factory=dict)
    # s = alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732, eq. 4)
    rslora: bool = False
    dora: bool = False  # train the length m of every row apart from its direction
    # Share of the inputs of a that a training step sets to zero, the others divided by 1 - dropout
    # (Hu et al. 2021, table 11). Drawn from the rows' seeds (nn/dropout.py); nothing is dropped
    # in evaluation, generation, a reference or a merge.
    dropout: Fraction = 0.0

    def names(self, params: Params) -> list[str]:
        """Names of the weights that the targets match; InputError for a glob without a match and
        for a weight that is no linear map.
        """
        for glob in self.targets:
            is_matched = any(fnmatchcase(name, glob) for name in params)
            if fnmatchcase("lm_head.weight", glob) and not is_matched:
                raise InputError(
                    f"lora: target {glob!r} is the head, which this model ties to its embedding, "
                    "expected a weight of its own; drop the target, or train "
                    "model.embed_tokens.weight whole"
                )
        names = tree.select(params, self.targets, "lora: target")
        for name in names:
            shape = list(params[name].shape)
            if len(shape) not in (2, 3) or name.endswith(("embed_tokens.weight", "_bias")):
                found = f"lora: {name} {shape} is not a linear weight"
                raise InputError(f"{found}, expected [out, in]; narrow the targets")
            if len(shape) == 3 and self.dora:
                raise InputError(
                    f"lora: {name} {shape} holds all experts of a layer, expected dora = false "
                    "for it; narrow the targets or drop dora"
                )
        self.check_dropout(names)
        if self.ranks:
            tree.select(names, list(self.ranks), "lora: ranks")
        return names

    def check_dropout(self, names: Iterable[str]) -> None:
        """InputError for a weight whose inputs can't be dropped, if the rule drops any."""
        for name in names:
            if self.dropout and (name == "lm_head.weight" or ".experts." in name):
                found = f"lora: {name} is adapted with dropout = {self.dropout}"
                raise InputError(
                    f"{found}, expected 0 for experts and the head, whose inputs are no longer in "
                    "the order of their rows; narrow the targets"
                )

    def rank_of(self, name: str) -> int:
        """Rank of a weight's delta: of the first glob in ranks that matches, else rank."""
        ranks = (rank for glob, rank in self.ranks.items() if fnmatchcase(name, glob))
        return next(ranks, self.rank)

    def scale(self, delta: Delta) -> float:
        """s = alpha / r with r the delta's own rank, or alpha / sqrt(r) with rslora."""
        rank = delta.a.shape[-2]
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def init(self, params: Params, seed: int) -> Deltas:
        """float32 deltas that change nothing yet: a uniform in +-1/sqrt(in), b zero, m the length
        of every row of W (with dora); drawn from (seed, weight name). A weight of all experts has a
        and b of every expert, in its own layout.
        """

        def delta(name: str, like: Delta) -> Delta:
            w, draws = params[name], seeds.generator(seed, "lora", name)
            device = tree.leaves(w)[0].device
            unit = torch.rand(like.a.shape, generator=draws, dtype=torch.float32)
            a = ((2 * unit - 1) / like.a.shape[-1] ** 0.5).to(device)
            fresh = Delta(a, torch.zeros(like.b.shape, dtype=torch.float32, device=device))
            return fresh._replace(m=row_norms(Adapted(gather(w), *fresh))) if self.dora else fresh

        return {name: delta(name, like) for name, like in self.like(params).items()}

    def like(self, params: Params) -> Deltas:
        """Deltas as `init` makes them, on the meta device: shapes without numbers."""

        def delta(name: str) -> Delta:
            *experts, out, in_ = params[name].shape
            shapes = ((self.rank_of(name), in_), (out, self.rank_of(name)), (out,))
            a, b, m = (torch.empty(*experts, *n, device="meta").float() for n in shapes)
            return Delta(a, b, m if self.dora else ())

        return {name: delta(name) for name in self.names(params)}

    def apply(self, params: Params, deltas: Deltas) -> Params:
        """Parameters for a forward: each adapted weight becomes one leaf that multiplies as W + s b
        a; TypeError for a delta of a weight that params do not have or that is adapted already.
        """
        for name in deltas:
            if name not in params or isinstance(params[name], Adapted):
                state = "adapted already" if name in params else "not there"
                raise TypeError(
                    f"lora: {name} is {state}, expected a weight of the base; apply deltas to the "
                    "base's params once"
                )
        adapted = {
            name: Adapted(params[name], d.a, self.scale(d) * d.b, d.m) for name, d in deltas.items()
        }
        return {**params, **adapted}

    def merge(self, params: Params, deltas: Deltas) -> Params:
        """All parameters, the adapted ones replaced by merged_weight, rounded once to the dtype of
        W.

        TypeError for a quantized weight: whether to merge onto what it stands for or onto the dense
        one is the caller's to say.
        """
        quantized = next((name for name in deltas if not isinstance(params[name], Tensor)), None)
        if quantized is not None:
            raise TypeError(
                f"lora: {quantized} is a {type(params[quantized]).__name__}, expected a dense "
                "tensor to merge onto; merge_trainable dequantizes it, or takes the weight that it "
                "was made from"
            )
        weights = {name: params[name] for name in deltas}
        merged = {n: self.merge_weight(w, deltas[n], w.dtype).weight for n, w in weights.items()}
        return {**params, **merged}

    def merge_weight(
        self,
        w: Float[Tensor, "*experts out in"],
        delta: Delta,
        dtype: torch.dtype,
        onto: Float[Tensor, "*experts out in"] | None = None,
    ) -> MergedWeight:
        """Weight with its delta, which was trained on w, merged onto w (or onto another base),
        rounded once to the dtype.
        """
        exact = self.merged_weight(w, delta)
        merged = (exact if onto is None else self.merged_weight(onto, delta)).to(dtype)
        return MergedWeight(merged, merge_error(merged, exact, w))

    def merged_weight(
        self, w: Float[Tensor, "*experts out in"], delta: Delta
    ) -> Float[Tensor, "*experts out in"]:
        """W + s b a, or m * (W + s b a) / |W + s b a| by rows where the delta has a magnitude, in
        float32 or wider.
        """
        wide = wide_dtype(w.dtype)
        total = w.to(wide) + self.scale(delta) * (delta.b.to(wide) @ delta.a.to(wide))
        if not isinstance(delta.m, Tensor):
            return total
        # a row of zeros stays one
        norms = torch.linalg.vector_norm(total, dim=1).clamp(min=torch.finfo(wide).tiny ** 0.5)
        return total * (delta.m.to(wide) / norms)[:, None]


def merge_error(
    merged: Float[Tensor, "*experts out in"],
    exact: Float[Tensor, "*experts out in"],
    w: Float[Tensor, "*experts out in"],
) -> Float[Tensor, ""]:
    """|merged - exact| / |exact - W|: the share of a weight's change that a merge lost.

    exact: merged_weight onto W, the weight that the delta was trained on. What is lost is rounding
    where `merged` was merged onto W as well, and W's own error where it was merged onto another
    base, such as the dense weight that a quantized W stands for.
    """
    lost, change = torch.linalg.vector_norm(merged - exact), torch.linalg.vector_norm(exact - w)
    return lost / change.clamp(min=torch.finfo(exact.dtype).tiny)


def check_deltas(params: Params, trainable: Trainable, where: str) -> None:
    """InputError unless every leaf fits a weight of params: a Delta's a [r, in], b [out, r] and m
    [out], or a tensor of the weight's own shape; `where` names their source.
    """
    for name, leaf in trainable.items():
        if name not in params:
            raise InputError(
                f"lora: {where} adapts {name}, which this model does not have; is it of another "
                "base?"
            )
        shape = list(params[name].shape)
        if isinstance(leaf, Tensor):
            if list(leaf.shape) != shape:
                raise InputError(
                    f"lora: {where} has {name} {list(leaf.shape)}, expected {shape}; is it of "
                    "another base?"
                )
        elif len(shape) < 2 or [*leaf.b.shape[:-1], leaf.a.shape[-1]] != shape:
            shapes = f"a {list(leaf.a.shape)} and b {list(leaf.b.shape)}"
            *experts, out, in_ = [f"{n}" for n in shape] if len(shape) > 1 else ["out", "in"]
            a, b = (", ".join([*experts, *pair]) for pair in (("r", in_), (out, "r")))
            raise InputError(
                f"lora: {where} has {shapes} for {name}, expected [{a}] and [{b}]; is it of "
                "another base?"
            )
