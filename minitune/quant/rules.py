"""Rules that say which weight is quantized by which scheme."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec
from torch import Tensor

from minitune import tree
from minitune.errors import InputError
from minitune.quant import schemes
from minitune.quant.schemes import Scheme, base_weight, check_fit, with_base_weight
from minitune.quant.tensors import QTensor
from minitune.structs import CheckedStruct
from minitune.types import Delta, Params, Trainable


class Quantization(CheckedStruct, frozen=True, forbid_unknown_fields=True):
    """Choice of a scheme for each weight: those that a glob matches get `scheme`, or what the first
    matching exception says.
    """

    scheme: Scheme
    weights: tuple[str, ...] = ("*_proj.weight",)
    # glob -> another scheme, or None to leave the weight as it is
    exceptions: dict[str, Scheme | None] = msgspec.field(default_factory=dict)

    def plan(self, params: Params) -> dict[str, Scheme]:
        """Scheme of every weight that is to be quantized. InputError for a glob without a match,
        for what is no linear map (embeddings and tied heads too: their rows are looked up) or
        quantized already, and for a shape that does not fit.
        """
        names = tree.select(params, self.weights, "quant: weights")
        if self.exceptions:
            tree.select(names, tuple(self.exceptions), "quant: exceptions")
        schemes = {name: self.scheme_of(name) for name in names}
        plan = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        for name, scheme in plan.items():
            w = base_weight(params[name])
            if not isinstance(w, Tensor):
                raise InputError(
                    f"quant: {name} is a {type(w).__name__} already, expected a plain weight; "
                    "narrow the weights"
                )
            _refuse_stack(name, w)
            if w.ndim != 2 or name.endswith("embed_tokens.weight"):
                raise InputError(
                    f"quant: {name} {list(w.shape)} is not a linear weight, expected [out, in]; "
                    "narrow the weights or except it"
                )
            check_fit(name, w, scheme)
        return plan

    def names(self, params: Params) -> list[str]:
        """Weights that are to be quantized; InputError as for plan."""
        return list(self.plan(params))

    def codes(self, params: Params) -> dict[str, QTensor]:
        """Planned weights alone, rounded to nearest; on the meta device, only their layout."""
        plan = self.plan(params)
        return {name: schemes.quantize(base_weight(params[name]), plan[name]) for name in plan}

    def quantize(self, params: Params) -> Params:
        """Parameters, the planned ones rounded to nearest; InputError names one that holds NaN or
        infinity.
        """
        plan = self.plan(params)
        refuse_not_finite(params, plan)
        codes = self.codes(params)
        return {
            name: with_base_weight(w, codes[name]) if name in codes else w
            for name, w in params.items()
        }

    def fake(self, trainable: Trainable) -> Trainable:
        """Trainable tree with its planned weights rounded as they will be stored; everything else
        passes through.
        """

        def rounded(name: str, leaf: Tensor | Delta) -> Tensor | Delta:
            scheme = self.scheme_of(name)
            return leaf if scheme is None or isinstance(leaf, Delta) else schemes.fake(leaf, scheme)

        return {name: rounded(name, leaf) for name, leaf in trainable.items()}

    def scheme_of(self, name: str) -> Scheme | None:
        """Scheme of a weight by its name alone; None for one that stays as it is."""
        if not any(fnmatchcase(name, glob) for glob in self.weights):
            return None
        return next(
            (scheme for glob, scheme in self.exceptions.items() if fnmatchcase(name, glob)),
            self.scheme,
        )


def refuse_not_finite(params: Params, names: Iterable[str]) -> None:
    """InputError names the first weight that holds NaN or infinity, for which no scale exists."""
    bad = next(
        (name for name in names if not bool(base_weight(params[name]).isfinite().all())), None
    )
    if bad is not None:
        raise InputError(
            f"quant: {bad} holds values that are not finite, expected numbers; has the training "
            "diverged?"
        )


def _refuse_stack(name: str, w: Tensor) -> None:
    """InputError for all experts of a layer in one tensor, which codes and their products are not
    made for."""
    if ".experts." in name and w.ndim == 3:
        last = name.rpartition(".")[2]
        raise InputError(
            f"quant: {name} {list(w.shape)} holds all experts of a layer in one tensor, expected "
            f'[out, in]: no scheme has codes for it; leave it as it is with keep = ["*.{last}"]'
        )
