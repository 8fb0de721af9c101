"""Stage that registers a result: a version in MLflow, W&B, Azure ML or the Hugging Face Hub."""

from minitune.programs.card.model_card import CARD_SAMPLES
from minitune.programs.registering import check_name, register
from minitune.programs.stages.publishing_stage import PublishingStage
from minitune.programs.state import AbstractState, PipelineState


class Register(PublishingStage, frozen=True, kw_only=True, tag="register"):
    """Make what a stage before wrote a version of a registered model.

    The same content makes no second version. The version keeps the program, the seed, the hashes of
    the inputs, the base, and the figures of the stages.
    """

    # mlflow:NAME, wandb:ENTITY/PROJECT/NAME, azureml:NAME, hf:OWNER/NAME; NAME alone is of MLflow
    to: str
    aliases: tuple[str, ...] = ()  # that name the version from now on, such as "best"
    update: bool = False  # make a new version of a content that has one

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless a stage before writes what is registered, and the registry answers."""
        self.require_result(abstract)
        check_name(self.to)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of the version."""
        if self.label in state.records:
            return state
        name = check_name(self.to)
        done = register(
            name,
            self.subject(state, name.name, CARD_SAMPLES),
            self.aliases,
            lambda text: state.log.say(f"{self.label}: {text}"),
            update=self.update,
        )
        what = "registered as" if done.is_new else "has these files already:"
        state.log.say(f"{self.label}: {what} {done.name}")
        return state.record(self.label, {"what": "version", "path": done.name})
