"""Stage that opens what was written with another program, and compares it with minitune."""

from pathlib import Path
from typing import ClassVar

from minitune.errors import InputError, nearest
from minitune.interop.artefacts import FORMATS, FormatName, format_written, require_reader
from minitune.io.paths import locate
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.programs.verification import (
    PROMPTS,
    Questions,
    Reference,
    as_record,
    as_stored,
    base_of_adapter,
    opened,
    require_agreement,
    verify,
    write_figures,
)
from minitune.types import PositiveInt


class Verify(BaseStage, frozen=True, kw_only=True, tag="verify"):
    """Open what a stage before has written with an independent reader (transformers, PEFT, gguf,
    onnxruntime, ExecuTorch), compare logits and greedy text with minitune's, and end the run where
    they differ by more than the format allows. The figures are in verify.json beside it.
    """

    observes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    # run/NAME that a stage before writes; what the last one of them wrote if absent
    path: str | None = None
    prompts: tuple[str, ...] = PROMPTS  # texts that both are asked
    max_new_tokens: PositiveInt = 32  # tokens of each greedy answer

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless a stage before writes it, and its reader is installed."""
        if not self.prompts:
            raise InputError(
                f"stages: {self.label} has no prompts, expected one at least; write one, or remove "
                "the key"
            )
        require_reader(format_written(abstract.written[self._path(abstract)]))
        return abstract

    def _path(self, abstract: AbstractState) -> str:
        """Path in the program of what is verified; InputError if no stage before writes it."""
        names = list(abstract.written)
        path = self.path or next(reversed(names), None)
        if path is None or path not in abstract.written:
            found = "finds nothing written" if path is None else f"is to verify {path!r}"
            wanted = f"one of {', '.join(names)}" if names else "a save or export stage before it"
            remedy = nearest(str(path), names) or "; correct it"
            raise InputError(
                f"stages: {self.label} {found}, which no stage before it writes, expected "
                f"{wanted}{remedy}"
            )
        return path

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of the figures."""
        records = {r["path"]: r["what"] for r in state.records.values() if "sha256" in r}
        path = str(locate(self.path, state.folder)) if self.path else list(records)[-1]
        name = format_written(records[path])
        whole = state if name in ("adapter", "folder") else state.on_host()
        if state.sharding is not None and not state.ranks.is_first:
            return state
        reference, base = self._reference(whole, path, name)
        state.log.say(f"{self.label}: opening {path} with {', '.join(FORMATS[name].packages)}")
        figures = verify(
            Path(path), name, reference, Questions(self.prompts, self.max_new_tokens), base
        )
        written = write_figures(Path(path), figures)
        for line in figures.lines():
            state.log.say(f"{self.label}: {line}")
        state.log.say(f"{self.label}: figures in {written}")
        require_agreement(figures)
        return state.record(self.label, as_record(figures))

    def _reference(
        self, state: PipelineState, path: str, name: FormatName
    ) -> tuple[Reference, Path | None]:
        """(model that it is held against, folder below an adapter)."""
        if name == "adapter":
            base = base_of_adapter(Path(path))
            return opened(str(base), path, same_weights=True), base
        if name == "folder":
            return opened(path, None, same_weights=True), None
        return as_stored(state.loaded, f"the model of {self.label}"), None
