"""Low-rank adaptation: a rule that makes, scales and merges deltas. It never touches the model it adapts."""

from typing import Annotated

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from minitune import seeds, tree
from minitune.types import Delta, Deltas, InputError, Params


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """W' = W + (alpha / rank) * b a on every weight that a target glob matches (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""

    rank: Annotated[int, msgspec.Meta(gt=0)]
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def names(self, params: Params) -> list[str]:
        """The weights that the targets match; InputError for a glob without a match and for a weight that is no linear map."""
        names = tree.select(params, self.targets, "lora: target")
        for name in names:
            if params[name].ndim != 2 or name.endswith("embed_tokens.weight"):
                shape = list(params[name].shape)
                raise InputError(f"lora: {name} {shape} is not a linear weight, expected [out, in]; narrow the targets")
        return names

    def init(self, params: Params, seed: int) -> Deltas:
        """float32 deltas that change nothing yet: a uniform in +-1/sqrt(in), b zero; drawn from (seed, weight name)."""

        def delta(name: str, w: Tensor) -> Delta:
            out, in_ = w.shape
            unit = torch.rand(self.rank, in_, generator=seeds.generator(seed, "lora", name))
            return Delta(((2 * unit - 1) / in_**0.5).to(w.device), torch.zeros(out, self.rank, device=w.device))

        return {name: delta(name, params[name]) for name in self.names(params)}

    def scaled(self, deltas: Deltas) -> Deltas:
        """The deltas as a forward takes them, with alpha / rank inside b."""
        return {name: Delta(delta.a, self.scale * delta.b) for name, delta in deltas.items()}

    def merge(self, params: Params, deltas: Deltas) -> Params:
        """All parameters, the adapted ones replaced by W + scale * b a: computed in float32, rounded once to the dtype of W."""
        merged = {name: self.merged_weight(params[name], delta).to(params[name].dtype) for name, delta in deltas.items()}
        return {**params, **merged}

    def merged_weight(self, w: Float[Tensor, "out in"], delta: Delta) -> Float[Tensor, "out in"]:
        """W + scale * b a in float32 or wider."""
        wide = torch.promote_types(w.dtype, torch.float32)
        return w.to(wide) + self.scale * (delta.b.to(wide) @ delta.a.to(wide))

    def merge_error(self, params: Params, deltas: Deltas, merged: Params) -> float:
        """Largest |stored - exact| / |b a scale| over the adapted weights: the share of the adaptation that rounding lost."""

        def error(name: str, delta: Delta) -> Float[Tensor, ""]:
            exact = self.merged_weight(params[name], delta)
            change = torch.linalg.vector_norm(exact - params[name])
            return torch.linalg.vector_norm(merged[name] - exact) / change.clamp(min=torch.finfo(exact.dtype).tiny)

        return max((float(error(name, delta)) for name, delta in deltas.items()), default=0.0)


def check_deltas(params: Params, deltas: Deltas, where: str) -> None:
    """InputError unless every delta fits a weight of params: a [R, in] and b [out, R]; `where` names their source."""
    for name, delta in deltas.items():
        if name not in params:
            raise InputError(f"lora: {where} adapts {name}, which this model does not have; is it of another base?")
        out, in_ = params[name].shape
        if delta.a.shape[1] != in_ or delta.b.shape[0] != out:
            found = f"a {list(delta.a.shape)} and b {list(delta.b.shape)}"
            raise InputError(f"lora: {where} has {found} for {name}, expected [r, {in_}] and [{out}, r]; is it of another base?")
