"""Stage that writes a model for inference elsewhere: quantized folders, GGUF files, graphs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from minitune.algorithms.importance import Importance, column_importance
from minitune.checkpoint.hf_folder import FolderExtras
from minitune.checkpoint.tensors import require_finite
from minitune.errors import InputError
from minitune.interop import (
    bitsandbytes,
    compressed_tensors,
    executorch,
    executorch_tokenizer,
    onnx,
    torchao,
)
from minitune.interop.gguf import export
from minitune.io.paths import locate
from minitune.io.results import Result, saved_hashes
from minitune.programs.data_tables import require_data
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.batches import calibration_batches, tokenized
from minitune.programs.stages.save import folder_extras, say_notes
from minitune.programs.state import AbstractState, PipelineState
from minitune.sharding.gather import gather
from minitune.types import Params, PositiveInt

DENSE_FORMATS = ("gguf", "onnx", "executorch")  # of weights that need not be quantized


class Export(BaseStage, frozen=True, kw_only=True, tag="export"):
    """Write a model for inference elsewhere: quantized for transformers and vLLM
    (compressed-tensors), llama.cpp (gguf) or bitsandbytes (nf4), dense for onnxruntime (onnx),
    dense or quantized for phones (executorch).
    """

    observes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    # compressed-tensors for transformers and vLLM, gguf for llama.cpp, bitsandbytes for nf4,
    # torchao for transformers with that package, onnx for onnxruntime, executorch for phones
    format: Literal["compressed-tensors", "gguf", "bitsandbytes", "torchao", "onnx", "executorch"]
    # a folder, or a file for gguf, run/NAME in the run folder; run/<format> or run/model.gguf if
    # absent
    path: str | None = None
    # compressed-tensors and torchao: int8 rounds each token's activations as well; executorch does
    # so wherever weights are quantized, and wants it said
    activations: Literal["none", "int8"] = "none"
    types: export.Types = export.Types("Q4_K_M")  # types of the stored matrices, for gguf
    # gguf: data by which the K types weigh errors; without it llama.cpp's own weights
    importance: Importance | None = None
    dtype: onnx.GraphDtype = "float32"  # of the weights and of all that is computed, for onnx
    # onnx: the keys and values of earlier tokens are inputs and outputs of the graph, so that a new
    # token costs no more than itself
    cache: bool = True
    # executorch: tokens of a prompt with its answer that the program has room for; the positions of
    # the model, but at most 2048, if absent
    max_context_len: PositiveInt | None = None

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
        if self.format not in DENSE_FORMATS and not abstract.quantized:
            raise InputError(
                f"stages: {self.label} finds no quantized weight to write as {self.format}; put a "
                "quantize stage before it"
            )
        params = {**abstract.params, **abstract.codes}
        if self.importance is not None:
            self._check_importance(abstract, self.importance)
        self._check_format(abstract, params)
        return abstract._replace(written={**abstract.written, self.result.path: self.format})

    def _check_format(self, abstract: AbstractState, params: Params) -> None:
        """InputError for what the format does not hold."""
        if self.format == "gguf" and abstract.tokenizer is not None:
            export.check(params, abstract.model, self.types, abstract.tokenizer)
        elif self.format == "bitsandbytes":
            bitsandbytes.check(params)
        elif self.format == "torchao":
            torchao.check(params)
        elif self.format == "compressed-tensors":
            compressed_tensors.check(params, self.activations)
        elif self.format == "onnx":
            onnx.check(params, abstract.model)
        elif self.format == "executorch":
            executorch.check(params, abstract.model, **self._of_executorch())

    def _of_executorch(self) -> dict[str, Any]:
        """Keys of the stage that ExecuTorch's programs depend on."""
        return {"activations": self.activations, "max_context_len": self.max_context_len}

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
        importance = self._importance(state)  # every rank takes part in these forwards
        whole = state.on_host()
        if state.sharding is not None and not state.ranks.is_first:
            return state
        loaded = whole.loaded
        target = locate(self.result.path, state.folder)
        codes = {n: gather(w) for n, w in loaded.params.items() if not isinstance(w, Tensor)}
        params, extras = {**loaded.stored, **codes}, folder_extras(state, self.label)
        state.log.say(f"{self.label}: writing {self.format}")
        require_finite(params, f"stages: {self.label}")
        for line in self._write(state, target, params, extras, importance):
            state.log.say(f"{self.label}: {line}")
        say_notes(state, self.label, text_alone=True)
        n_bytes = _n_bytes(target)
        state.log.say(f"{self.label}: {self.format} in {target}, {n_bytes / 2**20:.2f} MiB")
        record = {"what": self.format, "path": str(target), "bytes": n_bytes}
        return state.record(self.label, {**record, "sha256": saved_hashes(target)})

    def _write(
        self,
        state: PipelineState,
        target: Path,
        params: Params,
        extras: FolderExtras,
        importance: Mapping[str, Tensor],
    ) -> list[str]:
        """Write the result and return lines on it for the log."""
        loaded = state.loaded
        if self.format == "gguf":
            return export.save(
                target,
                params,
                loaded.model,
                self.types,
                tokenizer=extras.tokenizer,
                template=loaded.template.source,
                stop_ids=extras.stop_ids,
                importance=importance,
                counting=extras.counting,
            )
        if self.format == "bitsandbytes":
            bitsandbytes.save(target, params, loaded.model, extras)
            return []
        if self.format == "torchao":
            torchao.save(target, params, loaded.model, extras, activations=self.activations)
            return []
        if self.format == "onnx":
            how: dict[str, Any] = {"dtype": self.dtype, "cache": self.cache}
            return onnx.save(target, params, loaded.model, extras, **how)
        if self.format == "executorch":
            how = {**self._of_executorch(), "bos_id": loaded.tokenizer.bos_id}
            lines = executorch.save(target, params, loaded.model, extras, **how)
            text = loaded.tokenizer, loaded.template
            return [*lines, *executorch_tokenizer.notes(target, *text)]
        compressed_tensors.save(target, params, loaded.model, extras, activations=self.activations)
        groups = compressed_tensors.described(params, self.activations)
        return [*groups, *compressed_tensors.notes(params)]

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


def _n_bytes(target: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else [target]
    return sum(file.stat().st_size for file in files)
