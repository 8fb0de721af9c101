"""Stage that registers a result: a version in MLflow, W&B, Azure ML or the Hugging Face Hub."""

from typing import ClassVar

from minitune.programs.card.model_card import Subject
from minitune.programs.page.run_files import read_run
from minitune.programs.registering import check_name, register
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.upload import require_result, result_place
from minitune.programs.state import AbstractState, PipelineState


class Register(BaseStage, frozen=True, kw_only=True, tag="register"):
    """Make what a stage before wrote a version of a registered model.

    The same content makes no second version. The version keeps the program, the seed, the hashes of
    the inputs, the base, and the figures of the stages.
    """

    observes: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    # mlflow:NAME, wandb:ENTITY/PROJECT/NAME, azureml:NAME, hf:OWNER/NAME; NAME alone is of MLflow
    to: str
    # what is registered: run/NAME, a folder, or a file; the newest result of the stages before it
    # if absent
    path: str | None = None
    aliases: tuple[str, ...] = ()  # that name the version from now on, such as "best"
    update: bool = False  # make a new version of a content that has one
    base: str | None = None  # OWNER/NAME of the base model at the Hub, for the card

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless a stage before writes what is registered, and the registry answers."""
        require_result(self.label, self.path, abstract)
        check_name(self.to)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of the version."""
        if self.label in state.records:
            return state
        name = check_name(self.to)
        place = result_place(self.label, self.path, state)
        subject = Subject(place, name.name, read_run(state.folder), self.base)
        done = register(
            name,
            subject,
            self.aliases,
            lambda text: state.log.say(f"{self.label}: {text}"),
            update=self.update,
        )
        what = "registered as" if done.is_new else "has these files already:"
        state.log.say(f"{self.label}: {what} {done.name}")
        return state.record(self.label, {"what": "version", "path": done.name})
