"""Stage that adds deltas to the weights that they change."""

from typing import Any, Literal

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.lora import Lora, merge_error
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.quant.schemes import dequantize
from minitune.tree import device_of
from minitune.types import Delta

Onto = Literal["trained", "stored"]  # what deltas are merged onto: the weights they trained on, or the dense ones on disk
Dtype = Literal["float32", "bfloat16", "float16"]


class Merge(BaseStage, frozen=True, kw_only=True, tag="merge"):
    """Fold what was trained into the weights: computed in float32, rounded once to the dtype that the weights are stored in."""

    onto: Onto = "trained"
    dtype: Dtype | None = None  # of the new weights from here on; as they were stored if absent

    def check(self, abstract: AbstractState) -> AbstractState:
        """There is something to merge, and what to merge it onto."""
        if not abstract.adapted and not abstract.whole:
            raise InputError(f"stages: {self.label} finds nothing trained to merge, expected a lora or full stage before it")
        check_onto(abstract, self.label, self.onto)
        left = abstract.quantized - abstract.adapted - abstract.whole
        return abstract._replace(adapted=frozenset(), whole=frozenset(), quantized=left, over=None, merged=True)

    def run(self, state: PipelineState) -> PipelineState:
        """state with new weights and nothing to train; the record holds what rounding lost."""
        stored, record = merged(state, self.label, self.onto, self.dtype)
        old, device = state.loaded.params, device_of(state.loaded.params, state.loaded.trainable)
        compute = next(w.dtype for w in old.values() if isinstance(w, Tensor))
        new = {name: stored[name].to(device, compute) for name in state.loaded.trainable}
        return state.with_model(params={**old, **new}, stored=stored, lora=None, trainable={}).record(self.label, record)


def check_onto(abstract: AbstractState, label: str, onto: Onto) -> None:
    """InputError where deltas from a folder are to be merged onto the quantized weights that they trained on elsewhere."""
    if abstract.over is not None and onto == "trained":
        raise InputError(
            f"stages: {label} is to merge deltas onto what they trained on, but that was quantized by {dict(abstract.over)} and "
            "is dense here, expected onto = 'stored'; or merge in the program that trains"
        )


def merged(state: PipelineState, label: str, onto: Onto, dtype: Dtype | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(all weights with what was trained folded in, a record of merge_error: the largest share of a weight's change lost).

    Deltas over quantized weights were trained on the dequantized ones: merging onto those is exact but for rounding, merging
    onto the dense weights on disk is not; the record and the log have both errors.
    """
    loaded = state.loaded
    whole = {name: leaf for name, leaf in loaded.trainable.items() if isinstance(leaf, Tensor)}
    deltas = {name: leaf for name, leaf in loaded.trainable.items() if isinstance(leaf, Delta)}
    kinds = {name: getattr(torch, dtype) if dtype else w.dtype for name, w in loaded.stored.items()}
    weights = {name: w.to(kinds[name]) for name, w in {**loaded.stored, **whole}.items()}
    if onto == "trained":
        codes = {name: w for name, w in loaded.params.items() if not isinstance(w, Tensor) and name not in deltas}
        weights = {**weights, **{name: dequantize(w, kinds[name]) for name, w in codes.items()}}
    errors: dict[str, float] = {"trained": 0.0, "stored": 0.0}
    for name, delta in deltas.items():
        rule, here = merge_rule(state), delta.a.device
        bases: dict[str, Tensor] = {"stored": loaded.stored[name].to(here, torch.float32)}
        w = loaded.params[name]
        bases["trained"] = bases["stored"] if isinstance(w, Tensor) else dequantize(w, torch.float32)
        exact = rule.merged_weight(bases["trained"], delta)
        for key, base in bases.items():
            final = rule.merged_weight(base, delta).to(kinds[name])
            errors = {**errors, key: max(errors[key], float(merge_error(final, exact, bases["trained"])))}
            weights = {**weights, name: final} if key == onto else weights
    record: dict[str, Any] = {"merge_error": errors[onto]}
    if any(not isinstance(loaded.params[name], Tensor) for name in deltas):
        record |= {"onto": onto, "merge_error_onto_trained": errors["trained"], "merge_error_onto_stored": errors["stored"]}
        state.log.say(
            f"{label}: merged onto the {'dequantized' if onto == 'trained' else 'dense'} weights; the share of a weight's change "
            f"that is lost: {errors['trained']:.2%} onto the dequantized ones, {errors['stored']:.2%} onto the dense ones on disk"
        )
    elif deltas:
        state.log.say(f"{label}: rounding loses at most {errors[onto]:.2%} of a weight's change")
    return weights, record


def merge_rule(state: PipelineState) -> Lora:
    if state.loaded.lora is None:
        raise TypeError("stages: deltas without a Lora rule, expected the stage that made them to set it")
    return state.loaded.lora
