"""Stage that gives away what a stage before it wrote: its path, and the base that a card names."""

from pathlib import Path
from typing import ClassVar

from minitune.errors import InputError
from minitune.io.paths import locate
from minitune.programs.card.model_card import Subject
from minitune.programs.page.run_files import read_run
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState, WritingStage


class PublishingStage(BaseStage, frozen=True, kw_only=True):
    """Stage that uploads or registers a result."""

    observes: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    # what is given away: run/NAME, a folder, or a file; the newest result of the stages before it
    # if absent
    path: str | None = None
    # OWNER/NAME of the base model at the Hub, for the card and adapter_config.json; what
    # `minitune download` fetched is known
    base: str | None = None

    def require_result(self, abstract: AbstractState) -> None:
        """InputError unless something lies at the path, or a stage before will write it; without a
        path, unless a stage before writes anything."""
        path = self.path
        if path is None and not abstract.written:
            wanted = "expected a save or export stage before it"
            raise InputError(f"stages: {self.label} finds nothing written, {wanted}, or a path")
        if path is None or path in abstract.written:
            return
        if path.startswith("run/") or not locate(path).exists():
            known = ", ".join(abstract.written) or "none"
            found = f"{self.label} path {path!r} is not there, and no stage before writes it"
            raise InputError(
                f"stages: {found}, expected one of those written ({known}); correct it"
            )

    def subject(self, state: PipelineState, name: str, n_samples: int) -> Subject:
        """Result, with the run that made it, for a card of a name with so many samples."""
        place = self._place(state)
        return Subject(place, name, read_run(state.folder), self.base, n_samples)

    def _place(self, state: PipelineState) -> Path:
        """Place of the result: at the path, else the newest one of the stages before."""
        if self.path is not None:
            return locate(self.path, state.folder)
        stages = list(state.stages.values())
        before = stages[: list(state.stages).index(self.label)]
        results = [stage.result for stage in before if isinstance(stage, WritingStage)]
        return locate(results[-1].path, state.folder)
