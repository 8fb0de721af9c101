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
    require_loss,
    required,
    with_draws,
)
from minitune.autodiff.row_values import checked_losses, checked_rows
from minitune.hardware import to_device
from minitune.lora import Lora
from minitune.models.model import Model
from minitune.types import LogProbs, Mean, Pairs, Params, SeededBatch, Trainable

MEMBERS = "needs_reference", "rewards"  # of a PreferenceLoss, beside its call


@runtime_checkable
class PreferenceLoss(Protocol):
    """Loss over pairs of answers, a struct of losses.PairLoss or a class of yours: a call,
    `rewards`, and `needs_reference`, True if it compares the policy with a frozen model.
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
    TypeError for a loss without needs_reference or rewards.
    """
    require_loss(loss, MEMBERS, "an instance of a PreferenceLoss, such as losses.Dpo()")

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
        chosen, rejected = rewards_of(loss, policy, frozen)
        readings = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).to(chosen.dtype),
            "logp_chosen_nats": policy.chosen,
            "logp_rejected_nats": policy.rejected,
        }
        losses = checked_losses(loss(policy, frozen), policy.chosen)
        return mean_of(losses), {name: mean_of(x) for name, x in readings.items()}

    return objective


def rewards_of(
    loss: PreferenceLoss, policy: LogProbs, reference: LogProbs | None
) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and rejected; TypeError for what is no pair of tensors [B]."""
    rewards = loss.rewards(policy, reference)
    of_loss = f"rewards of {type(loss).__name__}"
    if not isinstance(rewards, tuple | list) or len(rewards) != 2:
        raise TypeError(
            f"loss: {of_loss} returned a {type(rewards).__name__}, expected (those of chosen, "
            "those of rejected), one value a row each"
        )
    chosen, rejected = (checked_rows(x, len(policy.chosen), of_loss) for x in rewards)
    return chosen, rejected


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
