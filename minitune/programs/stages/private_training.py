"""Differentially private training as a program asks for it: its noise, and what it has spent."""

from typing import Any

import msgspec

from minitune.algorithms.dp_sgd import Privacy
from minitune.algorithms.privacy_accountant import epsilon_of, noise_for
from minitune.errors import InputError
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.types import NonNegativeFloat, OpenUnitInterval, PositiveFloat

ASSUMED = "as if each row were in a batch by a coin of its own, while batches are shuffled rows"


class PrivateTraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    Each row's gradient is clipped to max_norm, and normal noise of deviation noise * max_norm is
    added to their sum.

    Rows are what is private. Of noise and epsilon one is given: a target epsilon finds its noise by
    algorithms/privacy_accountant.py. The draws are those of a seed, and no secret.
    """

    max_norm: PositiveFloat  # largest norm of a row's gradient
    delta: OpenUnitInterval  # chance that epsilon does not hold; well below 1 / rows
    # sigma, the deviation of the noise in units of max_norm; or give epsilon
    noise: NonNegativeFloat | None = None
    # privacy to have spent at the end: less is more private, and noisier; or give noise
    epsilon: PositiveFloat | None = None

    def sigma(self, q: float, n_steps: int) -> float:
        """Noise multiplier, given or found, for n_steps at a sampling rate q."""
        if self.noise is not None:
            return self.noise
        assert self.epsilon is not None, "check_private refuses neither"
        return noise_for(self.epsilon, q, n_steps, self.delta)


def check_private(stage: TrainingStage, abstract: AbstractState) -> None:
    """InputError for what can't be private row by row."""
    privacy = stage.privacy
    if privacy is None:
        return
    source, found = abstract.data[stage.data], ""
    if (privacy.noise is None) == (privacy.epsilon is None):
        found = "neither noise nor epsilon" if privacy.noise is None else "both noise and epsilon"
        where = f"stages: {stage.label}.privacy"
        raise InputError(f"{where} has {found}, expected one of them; correct it")
    if source.packed and stage.loss.objective == "supervised":
        found = f"data.{stage.data}.packed = true, where several documents share a row"
    elif source.overlong == "split" or source.turns == "each":
        found = f"data.{stage.data} with several rows of one example (overlong or turns)"
    elif stage.sweep is not None:
        found = "a sweep"
    elif stage.loss.objective not in ("supervised", "preference"):
        found = f"loss {stage.loss.__struct_config__.tag!r}, which compares rows or has a teacher"
    if found:
        raise InputError(
            f"stages: {stage.label} has privacy and {found}, expected a row for each example, each "
            "with a loss of its own; change it, or drop privacy"
        )


def rule(stage: TrainingStage, n_rows: int, seed: int) -> Privacy:
    """Knobs of the private step of a stage over n_rows rows."""
    assert stage.privacy is not None, "the stage is private"
    sigma = stage.privacy.sigma(_rate(stage, n_rows), stage.steps)
    chunk = stage.micro_batch_size or stage.batch_size
    return Privacy(stage.privacy.max_norm, sigma, seed, chunk)


def spent(stage: TrainingStage, n_rows: int, n_steps: int) -> dict[str, Any]:
    """Entries of a stage's record: what n_steps have spent; nothing if it is not private."""
    if stage.privacy is None:
        return {}
    q, delta = _rate(stage, n_rows), stage.privacy.delta
    sigma = stage.privacy.sigma(q, stage.steps)
    epsilon = epsilon_of(sigma, q, n_steps, delta)
    return {"epsilon": epsilon, "delta": delta, "noise": sigma, "sampling_rate": q}


def say_spent(stage: TrainingStage, state: PipelineState, record: dict[str, Any]) -> None:
    """Say in the log what a private stage has spent."""
    if stage.privacy is None:
        return
    numbers = f"epsilon {record['epsilon']:.4g} at delta {record['delta']:g}"
    how = f"noise {record['noise']:.4g}, {record['sampling_rate']:.4g} of the rows a step"
    state.log.say(f"{stage.label}: spent {numbers} ({how}), counted {ASSUMED}")


def _rate(stage: TrainingStage, n_rows: int) -> float:
    return min(1.0, stage.batch_size / n_rows)
