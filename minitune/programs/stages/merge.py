"""Stage that merges deltas to the weights that they change."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from minitune.checkpoint.tensors import require_finite
from minitune.errors import InputError
from minitune.lora import Onto, merge_trainable
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.types import Delta

Dtype = Literal["float32", "bfloat16", "float16"]
ROUNDING_TO_MENTION = 0.01  # share of a change, from which on its cure is named


class Merge(BaseStage, frozen=True, kw_only=True, tag="merge"):
    """Fold what was trained into the weights: computed in float32, rounded once to the dtype that
    the weights are stored in.
    """

    shards: ClassVar[bool] = True

    # trained: the weights that the deltas trained on, rounded as they were; stored: the dense
    # ones of the model's folder
    onto: Onto = "trained"
    dtype: Dtype | None = None  # of the new weights from here on; as they were stored if absent

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless there is something to merge, and what to merge it onto."""
        if not abstract.adapted and not abstract.whole:
            raise InputError(
                f"stages: {self.label} finds nothing trained to merge, expected a lora or full "
                "stage before it"
            )
        check_onto(abstract, self.label, self.onto)
        left = abstract.quantized - abstract.adapted - abstract.whole
        codes = {name: w for name, w in abstract.codes.items() if name in left}
        abstract = abstract._replace(codes=codes)
        return abstract._replace(
            adapted=frozenset(), whole=frozenset(), quantized=left, trained_over=None, merged=True
        )

    def run(self, state: PipelineState) -> PipelineState:
        """State with new weights and nothing to train; the record holds what rounding lost."""
        whole = state.on_host(everywhere=True)
        stored, record = merged(whole, self.label, self.onto, self.dtype)
        old, placed = state.loaded.params, state.loaded.placed
        compute = next(w.dtype for w in old.values() if isinstance(w, Tensor))
        cut = state.cut
        new = {n: placed(n, cut(n, stored[n]), compute) for n in state.loaded.trainable}
        return state.with_model(
            params={**old, **new}, stored=stored, lora=None, trainable={}
        ).record(self.label, record)


def check_onto(abstract: AbstractState, label: str, onto: Onto) -> None:
    """InputError where deltas from a folder are to be merged onto the quantized weights that they
    trained on elsewhere.
    """
    if abstract.trained_over is not None and onto == "trained":
        raise InputError(
            f"stages: {label} is to merge deltas onto what they trained on, but that was quantized "
            f"by {dict(abstract.trained_over)} and is dense here, expected onto = 'stored'; or "
            "merge in the program that trains"
        )


def merged(
    state: PipelineState, label: str, onto: Onto, dtype: Dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(all weights with what was trained folded in, a record of merge_error: the largest share of a
    weight's change lost).

    Over quantized weights the record and the log have the errors of both bases.
    """
    loaded = state.loaded
    deltas = [name for name, leaf in loaded.trainable.items() if isinstance(leaf, Delta)]
    with state.log.counter(f"{label}: merging", len(deltas)) as count:
        weights, errors = merge_trainable(
            loaded.params,
            loaded.trainable,
            loaded.lora,
            stored=loaded.dense,
            onto=onto,
            dtype=getattr(torch, dtype) if dtype else None,
            on_delta=count,
        )
    require_finite(weights, f"stages: {label}")
    record: dict[str, Any] = {"merge_error": errors[onto]}
    if any(not isinstance(loaded.params[name], Tensor) for name in deltas):
        record |= {
            "onto": onto,
            "merge_error_onto_trained": errors["trained"],
            "merge_error_onto_stored": errors["stored"],
        }
        state.log.say(
            f"{label}: merged onto the {'dequantized' if onto == 'trained' else 'dense'} weights; "
            f"the share of a weight's change that is lost: {errors['trained']:.2%} onto the "
            f"dequantized ones, {errors['stored']:.2%} onto the dense ones on disk"
        )
    elif deltas:
        # A change that is small beside its weight falls between two numbers of 16 bits.
        keeps_all = errors[onto] < ROUNDING_TO_MENTION or dtype == "float32"
        advice = "" if keeps_all else '; dtype = "float32" in the stage keeps all of it'
        lost = f"rounding loses at most {errors[onto]:.2%} of a weight's change"
        state.log.say(f"{label}: {lost}{advice}")
    return dict(weights), record
