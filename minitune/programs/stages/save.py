"""Stage that writes the result: an adapter or a model folder."""

from functools import partial
from typing import Any, ClassVar, Literal

import msgspec

from minitune.checkpoint.carried import notes
from minitune.checkpoint.fingerprint import folder_fingerprint
from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.checkpoint.tensors import require_finite
from minitune.errors import InputError
from minitune.interop.peft.check import check_adapter
from minitune.interop.peft.layout import Base
from minitune.interop.peft.save import save_adapter
from minitune.io.paths import locate
from minitune.io.results import Result, saved_hashes
from minitune.lora import Onto
from minitune.models.open import config_json
from minitune.programs.sharding import whole_on_host
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.merge import Dtype, TrainedWeights, check_onto
from minitune.programs.state import AbstractState, PipelineState, SavedModel
from minitune.text.served import stop_ids


class Save(BaseStage, frozen=True, kw_only=True, tag="save"):
    """Write the result: deltas as a PEFT adapter, or a whole Hugging Face folder (`merged` deltas,
    or `params`).
    """

    observes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    # deltas: an adapter; merged: weights with the deltas in them; params: weights as they are
    what: Literal["deltas", "merged", "params"]
    path: str | None = None  # a folder, run/NAME for one in the run folder; run/<what> if absent
    # merged only; trained: the weights that the deltas trained on, rounded as they were; stored:
    # the dense ones of the model's folder
    onto: Onto = "trained"
    dtype: Dtype | None = None  # of the weights; as they were stored if absent

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the model will hold what is saved, and PEFT can hold the deltas."""
        present = "deltas" if abstract.adapted else "no deltas"
        wanted = "'params', or a lora stage before it"
        if abstract.adapted:
            wanted = "'merged', 'deltas', or a merge stage before it"
        if bool(abstract.adapted) != (self.what != "params"):
            raise InputError(
                f"stages: {self.label} is to save {self.what!r}, but the model holds {present}, "
                f"expected {wanted}"
            )
        if self.what == "params" and abstract.quantized:
            raise InputError(
                f"stages: {self.label} is to save quantized weights, expected dense ones; use an "
                "export stage"
            )
        if self.what == "merged":
            check_onto(abstract, self.label, self.onto)
        if self.what == "deltas" and abstract.merged:
            raise InputError(
                f"stages: {self.label} is to save deltas of weights that a merge stage made, which "
                "no folder holds, expected those of a folder; save params after the merge and load "
                "them before the lora stage"
            )
        if self.what == "deltas" and abstract.lora is not None:
            ranks = {name: abstract.lora.rank_of(name) for name in abstract.adapted}
            check_adapter(ranks, abstract.whole, names=abstract.params, dora=abstract.lora.dora)
        saved = SavedModel(abstract.model, abstract.tokenizer, abstract.template)
        return abstract._replace(
            saved={**abstract.saved, self.result.path: saved},
            written={**abstract.written, self.result.path: self.what},
        )

    @property
    def result(self) -> Result:
        """Folder that is written."""
        return Result(self.path or f"run/{self.what}", "folder")

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of where the result lies."""
        loaded, folder = state.loaded, locate(self.result.path, state.folder)
        record: dict[str, Any] = {"what": self.what, "path": str(folder)}
        state.log.say(f"{self.label}: writing {self.what}")
        if self.what == "deltas" and loaded.lora is not None:
            trainable = whole_on_host(loaded.trainable, state.ranks)
            if not state.ranks.is_first:
                return state
            require_finite(trainable, f"stages: {self.label}")
            rule = state.quantization
            base = Base(
                path=str(loaded.source or loaded.tokenizer_folder),
                fingerprint=folder_fingerprint(loaded.source) if loaded.source else None,
                quantization=msgspec.to_builtins(rule) if rule else None,
            )
            save_adapter(
                folder,
                trainable,
                loaded.lora,
                base=base,
                names=loaded.params,
                wrapper=config_json(loaded.source).get("model_type") if loaded.source else None,
                extras=folder_extras(state, self.label),
            )
        else:
            made = TrainedWeights(state, self.label, self.onto, self.dtype)
            extras = folder_extras(state, self.label)
            how: dict[str, Any] = {"made": made.wholes, "ranks": state.savers or state.ranks}
            save_folder(folder, made.like, loaded.model, extras, **how)
            if not state.ranks.is_first:
                return state
            record |= made.record()
            say_notes(state, self.label, text_alone=False)
        state.log.say(f"{self.label}: {self.what} in {folder}")
        return state.record(self.label, {**record, "sha256": saved_hashes(folder)})


def say_notes(state: PipelineState, label: str, *, text_alone: bool) -> None:
    """Say in the log what becomes of what the model's folder holds beside its text model."""
    source = state.loaded.source
    for line in notes(source, text_alone=text_alone) if source is not None else []:
        state.log.say(f"{label}: {line}")


def folder_extras(state: PipelineState, label: str) -> FolderExtras:
    """Files and settings of the model's folder that a result has too; what is written is counted
    under the label of the stage."""
    loaded = state.loaded
    template = loaded.template.source if loaded.template.origin.startswith("built-in") else None
    ends = stop_ids(loaded.tokenizer, loaded.template)
    counting = partial(state.log.counter, f"{label}: writing")
    return FolderExtras(loaded.tokenizer_folder, ends, template, loaded.source, counting)
