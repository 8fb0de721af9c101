"""Losses over pairs of answers, from their log-probabilities: sums over the answer, or averages
where a function says so.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.losses.base import BaseLoss, Nats, ObjectiveName, log1mexp
from minitune.types import LogProbs, NonNegativeFloat, PositiveFloat, UnitInterval


class BasePreferenceLoss(BaseLoss, frozen=True):
    """Preference loss: a call takes the log-probs of answer pairs under the policy and, where
    needs_reference, under a frozen model.
    """

    objective: ClassVar[ObjectiveName] = "preference"
    formats: ClassVar[tuple[str, ...]] = ("pairs",)
    compares_answers: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    rows_per_sample: ClassVar[int] = 2

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """Implicit rewards of the chosen and of the rejected answers, in nats."""
        raise NotImplementedError


def dpo(
    chosen: Nats,
    rejected: Nats,
    ref_chosen: Nats,
    ref_rejected: Nats,
    *,
    beta: float,
    label_smoothing: float,
) -> Nats:
    """-(1 - s) log sigmoid(x) - s log sigmoid(-x), x = beta ((chosen - ref_chosen) - (rejected -
    ref_rejected)), in nats (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; s > 0, for labels wrong
    with chance s, is Mitchell's conservative DPO).
    """
    x = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


class Dpo(BasePreferenceLoss, frozen=True, tag="dpo"):
    """Direct preference optimization; beta holds the policy to the reference."""

    # more holds the policy nearer to the reference (0.1: Rafailov et al. 2023, appendix B)
    beta: PositiveFloat = 0.1
    # chance that a pair's label is wrong: more makes the policy less sure
    label_smoothing: UnitInterval = 0.0

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """dpo of the summed log-probs."""
        return dpo(
            *_answers(policy, _present(reference)),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """beta * log(policy / reference)."""
        return _relative_rewards(self.beta, policy, reference)


def ipo(chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float) -> Nats:
    """((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 beta))^2 of averages, in nats^2
    (Azar et al. 2023, arXiv 2310.12036, eq. 17, where beta is tau; averages, as the authors ran it
    according to TRL's DPOTrainer).
    """
    return (_margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()


class Ipo(BasePreferenceLoss, frozen=True, tag="ipo"):
    """Identity preference optimization: the margin is to be 1 / (2 beta), and not more."""

    # more asks for a smaller margin, so holds the policy nearer to the reference
    beta: PositiveFloat = 0.1

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """ipo of the averaged log-probs."""
        return ipo(*_answers(_averaged(policy), _averaged(_present(reference))), beta=self.beta)

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """beta * log(policy / reference)."""
        return _relative_rewards(self.beta, policy, reference)


def hinge(
    chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float
) -> Nats:
    """max(0, 1 - beta ((chosen - ref_chosen) - (rejected - ref_rejected))): the hinge-norm loss of
    RSO (Liu et al. 2023, arXiv 2309.06657, where beta is gamma), which is SLiC's (Zhao et al. 2023,
    arXiv 2305.10425) relative to a reference.
    """
    return F.relu(1 - beta * _margin(chosen, rejected, ref_chosen, ref_rejected))


class Hinge(BasePreferenceLoss, frozen=True, tag="hinge"):
    """Loss of a support vector machine: a pair whose margin has reached 1 / beta is left alone."""

    # more is content with a smaller margin, so holds the policy nearer to the reference
    beta: PositiveFloat = 0.1

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """hinge of the summed log-probs."""
        return hinge(*_answers(policy, _present(reference)), beta=self.beta)

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """beta * log(policy / reference)."""
        return _relative_rewards(self.beta, policy, reference)


def apo_zero(
    chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float
) -> Nats:
    """1 - sigmoid(beta (chosen - ref_chosen)) + sigmoid(beta (rejected - ref_rejected)), without a
    unit (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7 as TRL's DPOTrainer has it).
    """
    lost = torch.sigmoid(-beta * (chosen - ref_chosen))
    return lost + torch.sigmoid(beta * (rejected - ref_rejected))


class ApoZero(BasePreferenceLoss, frozen=True, tag="apo_zero"):
    """Anchored preference optimization: the chosen answer becomes likelier than under the
    reference, and the rejected one less likely, each by itself.
    """

    # more saturates at a smaller change, so holds the policy nearer to the reference
    beta: PositiveFloat = 0.1

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """apo_zero of the summed log-probs."""
        return apo_zero(*_answers(policy, _present(reference)), beta=self.beta)

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """beta * log(policy / reference)."""
        return _relative_rewards(self.beta, policy, reference)


def apo_down(
    chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float
) -> Nats:
    """sigmoid(beta (chosen - ref_chosen)) + 1 - sigmoid(beta ((chosen - ref_chosen) - (rejected -
    ref_rejected))), without a unit (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8 as TRL's
    DPOTrainer has it).
    """
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected)
    return torch.sigmoid(beta * (chosen - ref_chosen)) + torch.sigmoid(-beta * margin)


class ApoDown(BasePreferenceLoss, frozen=True, tag="apo_down"):
    """Anchored preference optimization for chosen answers that are worse than the model's own: both
    answers become less likely than under the reference, and the rejected one more so.
    """

    # more saturates at a smaller change, so holds the policy nearer to the reference
    beta: PositiveFloat = 0.1

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """apo_down of the summed log-probs."""
        return apo_down(*_answers(policy, _present(reference)), beta=self.beta)

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """beta * log(policy / reference)."""
        return _relative_rewards(self.beta, policy, reference)


def simpo(chosen: Nats, rejected: Nats, *, beta: float, gamma: float) -> Nats:
    """-log sigmoid(beta (chosen - rejected) - gamma) of averages, in nats (Meng et al. 2024, arXiv
    2405.14734, eq. 6).
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


class SimPO(BasePreferenceLoss, frozen=True, tag="simpo"):
    """Simple preference optimization: no reference, answers of any length on one scale, and a
    target margin gamma in nats.
    """

    needs_reference: ClassVar[bool] = False

    beta: PositiveFloat = 2.0  # scale of the margin: more makes the loss steeper about gamma
    # target of the scaled margin, in nats: more drives the answers further apart
    gamma: NonNegativeFloat = 1.0

    def __call__(self, policy: LogProbs, reference: LogProbs | None = None) -> Nats:
        """simpo of the averaged log-probs."""
        mean = _averaged(policy)
        return simpo(mean.chosen, mean.rejected, beta=self.beta, gamma=self.gamma)

    def rewards(self, policy: LogProbs, reference: LogProbs | None = None) -> tuple[Nats, Nats]:
        """beta * averaged log-probs (Meng et al. 2024, eq. 4)."""
        return _scaled(self.beta, _averaged(policy))


def orpo(chosen: Nats, rejected: Nats, *, beta: float) -> Nats:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)) of averages, log odds(x) =
    x - log(1 - exp(x)), in nats (Hong et al. 2024, arXiv 2403.07691, eq. 6-7, where beta is
    lambda).
    """
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


class Orpo(BasePreferenceLoss, frozen=True, tag="orpo"):
    """Odds-ratio preference optimization: fine-tunes on the chosen answers and prefers them at
    once; beta weighs the preference.

    The fine-tuning term is each pair's own mean over the chosen answer's tokens, so that a batch is
    the mean of its pairs.
    """

    needs_reference: ClassVar[bool] = False

    beta: PositiveFloat = 0.1  # weight of the preference beside fine-tuning on the chosen answers

    def __call__(self, policy: LogProbs, reference: LogProbs | None = None) -> Nats:
        """orpo of the averaged log-probs."""
        mean = _averaged(policy)
        return orpo(mean.chosen, mean.rejected, beta=self.beta)

    def rewards(self, policy: LogProbs, reference: LogProbs | None = None) -> tuple[Nats, Nats]:
        """beta * averaged log-probs, as TRL logs them."""
        return _scaled(self.beta, _averaged(policy))


def cpo(chosen: Nats, rejected: Nats, nll: Nats, *, beta: float, nll_weight: float) -> Nats:
    """-log sigmoid(beta (chosen - rejected)) + nll_weight * nll, in nats; nll is the chosen
    answer's negative log-likelihood (Xu et al. 2024, arXiv 2401.08417, eq. 3 and the term L_NLL
    that follows it).
    """
    return nll_weight * nll - F.logsigmoid(beta * (chosen - rejected))


class Cpo(BasePreferenceLoss, frozen=True, tag="cpo"):
    """Contrastive preference optimization: DPO with a uniform reference, held in place by
    fine-tuning on the chosen answers.

    The fine-tuning term is each pair's own mean over the chosen answer's tokens, so that a batch is
    the mean of its pairs.
    """

    needs_reference: ClassVar[bool] = False

    # scale of the margin: more makes the loss steeper, and done with a pair sooner
    beta: PositiveFloat = 0.1
    # weight of fine-tuning on the chosen answers; 0: the preference alone
    nll_weight: NonNegativeFloat = 1.0

    def __call__(self, policy: LogProbs, reference: LogProbs | None = None) -> Nats:
        """cpo of the summed log-probs, with the averaged negative log-likelihood."""
        nll = -_averaged(policy).chosen
        return cpo(policy.chosen, policy.rejected, nll, beta=self.beta, nll_weight=self.nll_weight)

    def rewards(self, policy: LogProbs, reference: LogProbs | None = None) -> tuple[Nats, Nats]:
        """beta * summed log-probs, as TRL logs them."""
        return _scaled(self.beta, policy)


def _margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _answers(policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return policy.chosen, policy.rejected, reference.chosen, reference.rejected


def _averaged(x: LogProbs) -> LogProbs:
    return x._replace(
        chosen=x.chosen / x.n_chosen.clamp(min=1), rejected=x.rejected / x.n_rejected.clamp(min=1)
    )


def _relative_rewards(
    beta: float, policy: LogProbs, reference: LogProbs | None
) -> tuple[Tensor, Tensor]:
    """beta * log(policy / reference) of both answers (Rafailov et al. 2023, eq. 5 less the prompt's
    term).
    """
    ref = _present(reference)
    return beta * (policy.chosen - ref.chosen), beta * (policy.rejected - ref.rejected)


def _scaled(beta: float, x: LogProbs) -> tuple[Tensor, Tensor]:
    return beta * x.chosen, beta * x.rejected


def _present(reference: LogProbs | None) -> LogProbs:
    if reference is None:
        raise TypeError(
            "losses: the reference is None, expected LogProbs; this loss compares the policy with "
            "a frozen model"
        )
    return reference
