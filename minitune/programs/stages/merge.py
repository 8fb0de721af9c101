"""Stage that merges deltas to the weights that they change."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from minitune.algorithms.merging import NOTHING_LOST, largest_errors, merge_leaf
from minitune.checkpoint.shared_outcome import SharedOutcome
from minitune.checkpoint.tensors import require_finite
from minitune.errors import InputError
from minitune.lora import Onto
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.sharding.gather import gather
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
        made = TrainedWeights(state, self.label, self.onto, self.dtype)
        loaded, cut, outcome = state.loaded, state.cut, SharedOutcome(state.ranks)
        compute = next(w.dtype for w in loaded.params.values() if isinstance(w, Tensor))
        stored, params = {}, dict(loaded.params)
        with state.log.counter(f"{self.label}: merging", len(made.like)) as count:
            for name in made.like:
                w = made.weight(name)
                with outcome.block():  # each rank looks at its part
                    require_finite({name: w}, f"stages: {self.label}")
                stored[name] = w if w is loaded.stored[name] else cut(name, w)
                if name in loaded.trainable:
                    params[name] = loaded.placed(name, cut(name, w), compute)
                count()
        merged = state.with_model(params=params, stored=stored, lora=None, trainable={})
        return merged.record(self.label, made.record())


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


@final
class TrainedWeights:
    """All weights of a model, dense and with what was trained folded in. Each is computed when it
    is asked for, and all ranks that share the weights ask for the same ones in the same order.
    """

    def __init__(
        self, state: PipelineState, label: str, onto: Onto, dtype: Dtype | None = None
    ) -> None:
        self._state, self._label, self._dtype = state, label, dtype
        self._onto: Onto = onto
        self._errors: Mapping[Onto, float] = NOTHING_LOST
        dtypes = {n: getattr(torch, dtype) if dtype else None for n in state.loaded.stored}
        # their shapes and dtypes, on the meta device
        self.like = {
            name: torch.empty(
                w.shape,
                dtype=dtypes[name] or (w.dtype if isinstance(w, Tensor) else torch.bfloat16),
                device="meta",
            )
            for name, w in state.loaded.stored.items()
        }

    @property
    def wholes(self) -> dict[str, Callable[[], Tensor]]:
        """Functions that give each weight whole; InputError for NaN or infinity in it."""
        return {name: partial(self._whole, name) for name in self.like}

    def _whole(self, name: str) -> Tensor:
        w = gather(self.weight(name))
        require_finite({name: w}, f"stages: {self._label}")
        return w

    def weight(self, name: str) -> Tensor:
        """One weight; the part of this rank of one that ranks share and that has no delta."""
        loaded = self._state.loaded
        w, leaf, stored = loaded.params[name], loaded.trainable.get(name), loaded.dense(name)
        dtype = self.like[name].dtype
        how: dict[str, Any] = {"stored": stored, "onto": self._onto, "dtype": dtype}
        one = merge_leaf(name, w, leaf, loaded.lora, **how)
        self._errors = largest_errors(self._errors, one.errors)
        return one.weight

    def record(self) -> dict[str, Any]:
        """Record of merge_error, the largest share of a weight's change lost, once all weights were
        asked for; over quantized weights it and the log have the errors of both bases.
        """
        loaded, label, log = self._state.loaded, self._label, self._state.log
        onto, errors = self._onto, self._errors
        deltas = [name for name, leaf in loaded.trainable.items() if isinstance(leaf, Delta)]
        record: dict[str, Any] = {"merge_error": errors[onto]}
        if any(not isinstance(loaded.params[name], Tensor) for name in deltas):
            record |= {
                "onto": onto,
                "merge_error_onto_trained": errors["trained"],
                "merge_error_onto_stored": errors["stored"],
            }
            log.say(
                f"{label}: merged onto the {'dequantized' if onto == 'trained' else 'dense'} "
                f"weights; the share of a weight's change that is lost: {errors['trained']:.2%} "
                f"onto the dequantized ones, {errors['stored']:.2%} onto the dense ones on disk"
            )
        elif deltas:
            # A change that is small beside its weight falls between two numbers of 16 bits.
            keeps_all = errors[onto] < ROUNDING_TO_MENTION or self._dtype == "float32"
            advice = "" if keeps_all else '; dtype = "float32" in the stage keeps all of it'
            lost = f"rounding loses at most {errors[onto]:.2%} of a weight's change"
            log.say(f"{label}: {lost}{advice}")
        return record
