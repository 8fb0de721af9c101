"""Preference optimization over single answers that were found desirable or not."""

import torch
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
from minitune.losses.registry import UnpairedLoss
from minitune.models.model import Model
from minitune.types import Mean, Params, SeededBatch, Trainable, UnpairedBatch


def unpaired_preference(
    model: Model, lora: Lora | None, loss: UnpairedLoss, reference: Trainable | None
) -> Objective:
    """Objective of learning from single answers, each found desirable or not (KTO): the sum of
    their losses, in nats, and how many there are; the reference is given as for `preference`.

    The mismatched answers of a micro-batch estimate how far the policy, without its dropout, has
    drifted from the reference.
    """
    require_loss(loss, ("rewards",), "an instance such as losses.Kto()")

    def objective(
        trainable: Trainable,
        params: Params,
        batch: UnpairedBatch | SeededBatch,
    ) -> tuple[Mean, dict[str, Mean]]:
        drawing, unpaired = with_draws(model, lora, batch, UnpairedBatch)
        rows = unpaired.answers, unpaired.mismatched
        adapted = apply_trainable(params, trainable, lora)
        with torch.no_grad():  # first: what the policy keeps for its backward is not there yet
            drifted = answer_logps(model, adapted, rows[1])
            if isinstance(unpaired.reference, Tensor):
                frozen, mismatched = to_device(unpaired.reference, drifted.device).unbind(1)
            else:
                base = apply_trainable(params, required(reference, "unpaired_preference"), lora)
                frozen, mismatched = (answer_logps(model, base, answers) for answers in rows)
            kl = (drifted - mismatched).mean().clamp(min=0.0)
        policy = answer_logps(drawing, adapted, rows[0])
        of_loss = f"rewards of {type(loss).__name__}"
        rewards = checked_rows(loss.rewards(policy, frozen), len(policy), of_loss)
        desirable = to_device(unpaired.desirable, policy.device)
        readings = {
            "reward_desirable": Mean.of(rewards, desirable),
            "reward_undesirable": Mean.of(rewards, ~desirable),
            "kl_nats": mean_of(kl.expand_as(policy)),
        }
        losses = checked_losses(loss(policy, frozen, desirable, kl), policy)
        return mean_of(losses), tree.map(Tensor.detach, readings)

    return objective
