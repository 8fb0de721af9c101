"""Stages that write the result: adapters and model folders, and quantized folders and files for
inference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
from torch import Tensor

from minitune.algorithms.importance import Importance, column_importance
from minitune.checkpoint.carried import notes
from minitune.checkpoint.fingerprint import folder_fingerprint
from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.checkpoint.tensors import require_finite
from minitune.errors import InputError
from minitune.interop import bitsandbytes, compressed_tensors
from minitune.interop.gguf import export
from minitune.interop.peft.check import check_adapter
from minitune.interop.peft.layout import Base
from minitune.interop.peft.save import save_adapter
from minitune.io.paths import locate
from minitune.io.results import Result, saved_hashes
from minitune.lora import Onto
from minitune.models.open import config_json
from minitune.programs.data_tables import require_data
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.batches import calibration_batches, tokenized
from minitune.programs.stages.merge import Dtype, check_onto, merged
from minitune.programs.state import AbstractState, PipelineState, SavedModel
from minitune.text.served import stop_ids


class Save(BaseStage, frozen=True, kw_only=True, tag="save"):
    """Write the result: deltas as a PEFT adapter, or a whole Hugging Face folder (`merged` deltas,
    or `params`).
    """

    observes: ClassVar[bool] = True

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
        written = (*abstract.written, self.result.path)
        return abstract._replace(saved={**abstract.saved, self.result.path: saved}, written=written)

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
            require_finite(loaded.trainable, f"stages: {self.label}")
            rule = state.quantization
            base = Base(
                path=str(loaded.source or loaded.tokenizer_folder),
                fingerprint=folder_fingerprint(loaded.source) if loaded.source else None,
                quantization=msgspec.to_builtins(rule) if rule else None,
            )
            save_adapter(
                folder,
                loaded.trainable,
                loaded.lora,
                base=base,
                names=loaded.params,
                wrapper=config_json(loaded.source).get("model_type") if loaded.source else None,
                extras=_folder_extras(state),
            )
        else:
            final, errors = merged(state, self.label, self.onto, self.dtype)
            require_finite(final, f"stages: {self.label}")
            with state.log.counter(f"{self.label}: writing", len(final)) as count:
                extras = _folder_extras(state)._replace(on_tensor=count)
                save_folder(folder, final, loaded.model, extras)
            record |= errors
            _say_notes(state, self.label, text_alone=False)
        state.log.say(f"{self.label}: {self.what} in {folder}")
        return state.record(self.label, {**record, "sha256": saved_hashes(folder)})


class Export(BaseStage, frozen=True, kw_only=True, tag="export"):
    """Write a quantized model for inference elsewhere: transformers and vLLM (compressed-tensors),
    llama.cpp (gguf), or bitsandbytes (nf4).
    """

    observes: ClassVar[bool] = True

    # compressed-tensors for transformers and vLLM, gguf for llama.cpp, bitsandbytes for nf4
    format: Literal["compressed-tensors", "gguf", "bitsandbytes"]
    # a folder, or a file for gguf, run/NAME in the run folder; run/<format> or run/model.gguf if
    # absent
    path: str | None = None
    # compressed-tensors: int8 rounds each token's activations as well (W8A8)
    activations: Literal["none", "int8"] = "none"
    types: export.Types = export.Types("Q4_K_M")  # types of the stored matrices, for gguf
    # gguf: data by which the K types weigh errors; without it llama.cpp's own weights
    importance: Importance | None = None

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError if something is left to merge, or unless the weights are of the kind that the
        format holds.
        """
        training = sorted(abstract.adapted | abstract.whole)
        if training:
            raise InputError(
                f"stages: {self.label} finds {training[0]} still training, expected none; put a "
                "merge stage before"
            )
        if self.format != "gguf" and not abstract.quantized:
            raise InputError(
                f"stages: {self.label} finds no quantized weight to write as {self.format}; put a "
                "quantize stage before it"
            )
        params = {**abstract.params, **abstract.codes}
        if self.importance is not None:
            self._check_importance(abstract, self.importance)
        if self.format == "gguf" and abstract.tokenizer is not None:
            export.check(params, abstract.model, self.types, abstract.tokenizer)
        elif self.format == "bitsandbytes":
            bitsandbytes.check(params)
        elif self.format == "compressed-tensors":
            compressed_tensors.check(params, self.activations)
        return abstract._replace(written=(*abstract.written, self.result.path))

    def _check_importance(self, abstract: AbstractState, importance: Importance) -> None:
        """InputError unless a K type is written, and the data is there."""
        if self.format != "gguf":
            raise InputError(
                f"stages: {self.label} has importance and format {self.format!r}, expected it with "
                'format = "gguf", whose K types use it; remove importance'
            )
        kinds = [self.types.default, *self.types.exceptions.values()]
        if not any("_K" in kind for kind in kinds):
            raise InputError(
                f"stages: {self.label} has importance and the types {', '.join(kinds)}, expected a "
                "K type among them, which alone use it; choose Q4_K_M, or remove importance"
            )
        require_data(abstract, importance.data, self.label, "instruct", "chat", "text")

    def prepare(self, abstract: AbstractState) -> list[str]:
        """Notes on the data of importance; InputError for a row that can't be tokenized."""
        if self.importance is None:
            return []
        return [tokenized(abstract, self.importance.data).description]

    @property
    def result(self) -> Result:
        """Folder that is written, or the file."""
        if self.format == "gguf":
            return Result(self.path or "run/model.gguf", "file")
        return Result(self.path or f"run/{self.format}", "folder")

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of where the result lies and of its bytes."""
        loaded = state.loaded
        target = locate(self.result.path, state.folder)
        codes = {name: w for name, w in loaded.params.items() if not isinstance(w, Tensor)}
        params, extras = {**loaded.stored, **codes}, _folder_extras(state)
        state.log.say(f"{self.label}: writing {self.format}")
        require_finite(params, f"stages: {self.label}")
        if self.format == "gguf":
            lines = export.save(
                target,
                params,
                loaded.model,
                self.types,
                tokenizer=extras.tokenizer,
                template=loaded.template.source,
                stop_ids=extras.stop_ids,
                importance=self._importance(state),
            )
            for line in lines:
                state.log.say(f"{self.label}: {line}")
        elif self.format == "bitsandbytes":
            bitsandbytes.save(target, params, loaded.model, extras)
        else:
            compressed_tensors.save(
                target, params, loaded.model, extras, activations=self.activations
            )
            groups = compressed_tensors.described(params, self.activations)
            for line in [*groups, *compressed_tensors.notes(params)]:
                state.log.say(f"{self.label}: {line}")
        _say_notes(state, self.label, text_alone=True)
        n_bytes = _n_bytes(target)
        state.log.say(f"{self.label}: {self.format} in {target}, {n_bytes / 2**20:.2f} MiB")
        record = {"what": self.format, "path": str(target), "bytes": n_bytes}
        return state.record(self.label, {**record, "sha256": saved_hashes(target)})

    def _importance(self, state: PipelineState) -> Mapping[str, Tensor]:
        """Importance of the columns of every linear map; of none without data for it."""
        if self.importance is None:
            return {}
        loaded, data, rows = state.loaded, self.importance.data, self.importance.rows
        batches = calibration_batches(state, self.label, data, rows)
        with state.log.progress(self.label, loaded.model.config.n_layers) as progress:
            return column_importance(
                loaded.model,
                loaded.params,
                batches,
                on_block=lambda n_done: progress.update(n_done, {}),
            )


def _say_notes(state: PipelineState, label: str, *, text_alone: bool) -> None:
    """Say in the log what becomes of what the model's folder holds beside its text model."""
    source = state.loaded.source
    for line in notes(source, text_alone=text_alone) if source is not None else []:
        state.log.say(f"{label}: {line}")


def _n_bytes(target: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else [target]
    return sum(file.stat().st_size for file in files)


def _folder_extras(state: PipelineState) -> FolderExtras:
    loaded = state.loaded
    template = loaded.template.source if loaded.template.origin.startswith("built-in") else None
    ends = stop_ids(loaded.tokenizer, loaded.template)
    return FolderExtras(loaded.tokenizer_folder, ends, template, loaded.source)
