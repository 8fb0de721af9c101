"""Stage that uploads a result with its model card to the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from minitune.errors import InputError
from minitune.io.paths import locate
from minitune.programs.card.model_card import Subject
from minitune.programs.card.publication import publish
from minitune.programs.page.run_files import read_run
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState, WritingStage
from minitune.registry.hub_upload import Target, require_target
from minitune.types import NonNegativeInt


class Upload(BaseStage, frozen=True, kw_only=True, tag="upload"):
    """Upload what a stage before wrote, with a model card, to the Hugging Face Hub (extra `hf`).

    Only files that changed are sent, in one commit. HF_TOKEN is the token.
    """

    observes: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    repo: str  # OWNER/NAME, which is made where there is none
    # what is uploaded: run/NAME, a folder, or a .gguf file; the newest result of the stages before
    # it if absent
    path: str | None = None
    revision: str = "main"  # branch that the commit is made on
    private: bool = False  # of a repository that is new
    # OWNER/NAME of the base model at the Hub, for the card and adapter_config.json; what
    # `minitune download` fetched is known
    base: str | None = None
    samples: NonNegativeInt = 3  # sample answers of the evaluations that the card shows

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless a stage before writes what is uploaded, and the Hub will take it."""
        require_result(self.label, self.path, abstract)
        require_target(self._target)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of the repository and the commit."""
        if self.label in state.records:
            return state
        place = result_place(self.label, self.path, state)
        run = read_run(state.folder)
        subject = Subject(place, self.repo, run, self.base, self.samples)
        done = publish(
            subject, self._target, None, lambda text: state.log.say(f"{self.label}: {text}")
        )
        state.log.say(f"{self.label}: {done.address} at {done.commit[:12]}")
        record = {"what": "upload", "path": done.address, "commit": done.commit}
        return state.record(self.label, {**record, "n_sent": done.n_sent})

    @property
    def _target(self) -> Target:
        return Target(self.repo, self.revision, self.private)


def require_result(label: str, path: str | None, abstract: AbstractState) -> None:
    """InputError unless something lies at a path, or a stage before will write it; without a path,
    unless a stage before writes anything."""
    if path is None and not abstract.written:
        wanted = "expected a save or export stage before it"
        raise InputError(f"stages: {label} finds nothing written, {wanted}, or a path")
    if path is None or path in abstract.written:
        return
    if path.startswith("run/") or not locate(path).exists():
        known = ", ".join(abstract.written) or "none"
        found = f"{label} path {path!r} is not there, and no stage before writes it"
        raise InputError(f"stages: {found}, expected one of those written ({known}); correct it")


def result_place(label: str, path: str | None, state: PipelineState) -> Path:
    """Place of what a stage is to take: at its path, else the newest result before it."""
    return locate(path if path is not None else _newest(label, state.stages), state.folder)


def _newest(label: str, stages: Mapping[str, Any]) -> str:
    """Path of the newest result that the stages before one write."""
    before = list(stages)[: list(stages).index(label)]
    results = [stages[name].result for name in before if isinstance(stages[name], WritingStage)]
    return results[-1].path
