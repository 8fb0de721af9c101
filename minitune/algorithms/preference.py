"""Preference optimization over pairs of answers."""

from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune import tree
from minitune.algorithms.objective import (
    Objective,
    answer_logps,
    apply_trainable,
    mean_of,
    required,
    with_draws,
)
from minitune.hardware import to_device
from minitune.lora import Lora
from minitune.models.model import Model
from minitune.types import LogProbs, Mean, Pairs, Params, SeededBatch, Trainable


@runtime_checkable
class PreferenceLoss(Protocol):
    """Methods of a loss over pairs of answers: every struct of losses.PairLoss has them, and so may
    a class of yours.
    """

    needs_reference: ClassVar[bool]

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected, [B] each."""
        ...

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Tensor:
        """One loss a pair [B], in nats."""
        ...


def preference(
    model: Model, lora: Lora | None, loss: PreferenceLoss, reference: Trainable | None
) -> Objective:
    """Objective of a loss over Pairs: the sum of the losses of all pairs, in nats, and how many
    there are, with rewards and log-probs as reports; one forward for chosen and rejected, and one
    without gradient for the reference.

    reference: the frozen trainable tree to compare with, {} for the parameters without deltas; None
    for a loss that compares with nothing, or when every batch carries the reference's log-probs.
    """

    def objective(
        trainable: Trainable, params: Params, batch: Pairs | SeededBatch
    ) -> tuple[Mean, dict[str, Mean]]:
        drawing, pairs = with_draws(model, lora, batch, Pairs)
        frozen = None
        if loss.needs_reference and not isinstance(pairs.reference, Tensor):
            with torch.no_grad():  # first: what the policy keeps for its backward is not there yet
                frozen = pair_logps(
                    model, apply_trainable(params, required(reference, "preference"), lora), pairs
                )
        policy = pair_logps(drawing, apply_trainable(params, trainable, lora), pairs)
        if loss.needs_reference and isinstance(pairs.reference, Tensor):
            cached = to_device(pairs.reference, policy.chosen.device)
            frozen = policy._replace(chosen=cached[:, 0], rejected=cached[:, 1])
        chosen, rejected = loss.rewards(policy, frozen)
        readings = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).to(chosen.dtype),
            "logp_chosen_nats": policy.chosen,
            "logp_rejected_nats": policy.rejected,
        }
        return mean_of(loss(policy, frozen)), {name: mean_of(x) for name, x in readings.items()}

    return objective


def pair_logps(model: Model, params: Params, pairs: Pairs) -> LogProbs:
    """Log-probs of chosen and rejected answers from one forward over both."""
    width = max(pairs.chosen.tokens.shape[1], pairs.rejected.tokens.shape[1])
    padded = (
        tree.map(lambda x: F.pad(x, (0, width - x.shape[1])), rows)
        for rows in (pairs.chosen, pairs.rejected)
    )
    rows = tree.map(lambda x, y: torch.cat([x, y]), *padded)
    logps = answer_logps(model, params, rows)
    n_tokens = to_device(rows.target_mask().sum(1), logps.device).to(logps.dtype)
    return LogProbs(*logps.chunk(2), *n_tokens.chunk(2))
