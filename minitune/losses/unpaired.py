"""Losses of single answers, each found desirable or not."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune.losses.base import BaseLoss, Nats, ObjectiveName
from minitune.types import NonNegativeFloat, PositiveFloat


def kto(
    policy: Nats,
    ref: Nats,
    desirable: Bool[Tensor, "*rows"],
    kl: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Nats:
    """w sigmoid(-+ beta (policy - ref - max(kl, 0))), minus for desirable answers and plus for
    others, in [0, w]: lambda_y - v of Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 8); kl [nats],
    the mean log-ratio of mismatched answers, gets no gradient.
    """
    gain = beta * (policy - ref - kl.detach().clamp(min=0.0))
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )


class Kto(BaseLoss, frozen=True, tag="kto"):
    """Kahneman-Tversky optimization: answers are unpaired, each compared with the reference point
    kl.
    """

    objective: ClassVar[ObjectiveName] = "unpaired_preference"
    formats: ClassVar[tuple[str, ...]] = ("unpaired",)
    compares_answers: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    min_samples: ClassVar[int] = 2  # the answers of a micro-batch are compared

    # more makes an answer's value saturate sooner: it holds the policy nearer to the reference
    beta: PositiveFloat = 0.1
    desirable_weight: NonNegativeFloat = 1.0  # of good answers; raise it where they are the fewer
    undesirable_weight: NonNegativeFloat = 1.0  # of bad answers; raise it where they are the fewer

    def __call__(
        self, policy: Nats, reference: Nats, desirable: Bool[Tensor, "*rows"], kl: Float[Tensor, ""]
    ) -> Nats:
        """kto of the summed log-probs, one value an answer."""
        weights = {
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        return kto(policy, reference, desirable, kl, beta=self.beta, **weights)

    def rewards(self, policy: Nats, reference: Nats) -> Nats:
        """beta * log(policy / reference), in nats."""
        return self.beta * (policy - reference)
