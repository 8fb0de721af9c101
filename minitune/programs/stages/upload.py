"""Stage that uploads a result with its model card to the Hugging Face Hub."""

from minitune.programs.card.publication import publish
from minitune.programs.stages.publishing_stage import PublishingStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.registry.hub_upload import Target, require_target
from minitune.types import NonNegativeInt


class Upload(PublishingStage, frozen=True, kw_only=True, tag="upload"):
    """Upload what a stage before wrote, with a model card, to the Hugging Face Hub (extra `hf`).

    Only files that changed are sent, in one commit. HF_TOKEN is the token.
    """

    repo: str  # OWNER/NAME, which is made where there is none
    revision: str = "main"  # branch that the commit is made on
    private: bool = False  # of a repository that is new
    samples: NonNegativeInt = 3  # sample answers of the evaluations that the card shows

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless a stage before writes what is uploaded, and the Hub will take it."""
        self.require_result(abstract)
        require_target(self._target)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of the repository and the commit."""
        if self.label in state.records:
            return state
        subject = self.subject(state, self.repo, self.samples)
        done = publish(
            subject, self._target, None, lambda text: state.log.say(f"{self.label}: {text}")
        )
        state.log.say(f"{self.label}: {done.address} at {done.commit[:12]}")
        record = {"what": "upload", "path": done.address, "commit": done.commit}
        return state.record(self.label, {**record, "n_sent": done.n_sent})

    @property
    def _target(self) -> Target:
        return Target(self.repo, self.revision, self.private)
