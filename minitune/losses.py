"""Losses: each a pure function and, right under it, the struct that a program writes; the unions at the end are the registry.

A loss gives one value a row and averages nothing. Tokens come as logits [n, V]; answers as log-probabilities of whole answers
[B], sums unless the function says averages: sums over the answer's tokens divided by their number.
"""

import math
from typing import Annotated, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor

from minitune.types import LogProbs

Nats = Float[Tensor, "*rows"]  # log-probabilities or losses
Logits = Float[Tensor, "*rows V"]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


def cross_entropy(logits: Logits, targets: Int[Tensor, "*rows"]) -> Nats:
    """log sum_v exp(logits_v) - logits_target, in nats, computed in float32 or wider, one value a row; nothing is averaged."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), reduction="none")
    return nats.reshape(targets.shape)


class CrossEntropy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cross_entropy", tag_field="kind"):
    """Next-token cross-entropy."""

    def __call__(self, logits: Logits, targets: Int[Tensor, "*rows"]) -> Nats:
        """The loss in nats, one value a row."""
        return cross_entropy(logits, targets)


class _PairLoss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """A call takes the log-probs of answer pairs under the policy and, where uses_reference, under a frozen model."""

    uses_reference: ClassVar[bool] = True

    beta: Positive = 0.1

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Nats, Nats]:
        """beta * log(policy / reference) of chosen and rejected, in nats (Rafailov et al. 2023, eq. 5 less the prompt's term)."""
        ref = _present(reference)
        return self.beta * (policy.chosen - ref.chosen), self.beta * (policy.rejected - ref.rejected)


def dpo(chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float, label_smoothing: float) -> Nats:
    """-(1 - s) log sigmoid(x) - s log sigmoid(-x), x = beta ((chosen - ref_chosen) - (rejected - ref_rejected)), in nats
    (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; s > 0, for labels wrong with chance s, is Mitchell's conservative DPO)."""
    x = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


class Dpo(_PairLoss, frozen=True, tag="dpo"):
    """Direct preference optimization; beta holds the policy to the reference."""

    label_smoothing: Share = 0.0

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """dpo of the summed log-probs."""
        return dpo(*_answers(policy, _present(reference)), beta=self.beta, label_smoothing=self.label_smoothing)


def ipo(chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float) -> Nats:
    """((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 beta))^2 of averages, in nats^2 (Azar et al. 2023,
    arXiv 2310.12036, eq. 17, where beta is tau; averages, as the authors ran it according to TRL's DPOTrainer)."""
    return (_margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()


class Ipo(_PairLoss, frozen=True, tag="ipo"):
    """Identity preference optimization: the margin is to be 1 / (2 beta), and not more."""

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """ipo of the averaged log-probs."""
        return ipo(*_answers(_averaged(policy), _averaged(_present(reference))), beta=self.beta)


def hinge(chosen: Nats, rejected: Nats, ref_chosen: Nats, ref_rejected: Nats, *, beta: float) -> Nats:
    """max(0, 1 - beta ((chosen - ref_chosen) - (rejected - ref_rejected))): the hinge-norm loss of RSO (Liu et al. 2023,
    arXiv 2309.06657, where beta is gamma), which is SLiC's (Zhao et al. 2023, arXiv 2305.10425) relative to a reference."""
    return F.relu(1 - beta * _margin(chosen, rejected, ref_chosen, ref_rejected))


class Hinge(_PairLoss, frozen=True, tag="hinge"):
    """A support vector machine's loss: a pair whose margin has reached 1 / beta is left alone."""

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Nats:
        """hinge of the summed log-probs."""
        return hinge(*_answers(policy, _present(reference)), beta=self.beta)


def simpo(chosen: Nats, rejected: Nats, *, beta: float, gamma: float) -> Nats:
    """-log sigmoid(beta (chosen - rejected) - gamma) of averages, in nats (Meng et al. 2024, arXiv 2405.14734, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


class SimPO(_PairLoss, frozen=True, tag="simpo"):
    """Simple preference optimization: no reference, answers of any length on one scale, and a target margin gamma in nats."""

    uses_reference: ClassVar[bool] = False

    beta: Positive = 2.0
    gamma: NonNegative = 1.0

    def __call__(self, policy: LogProbs, reference: LogProbs | None = None) -> Nats:
        """simpo of the averaged log-probs."""
        mean = _averaged(policy)
        return simpo(mean.chosen, mean.rejected, beta=self.beta, gamma=self.gamma)

    def rewards(self, policy: LogProbs, reference: LogProbs | None = None) -> tuple[Nats, Nats]:
        """beta * averaged log-probs (Meng et al. 2024, eq. 4)."""
        return _scaled(self.beta, _averaged(policy))


def orpo(chosen: Nats, rejected: Nats, *, beta: float) -> Nats:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)) of averages, log odds(x) = x - log(1 - exp(x)), in nats
    (Hong et al. 2024, arXiv 2403.07691, eq. 6-7, where beta is lambda)."""
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


class Orpo(_PairLoss, frozen=True, tag="orpo"):
    """Odds-ratio preference optimization: fine-tunes on the chosen answers and prefers them at once; beta weighs the preference.

    The fine-tuning term is each pair's own mean over the chosen answer's tokens, so that a batch is the mean of its pairs.
    """

    uses_reference: ClassVar[bool] = False

    def __call__(self, policy: LogProbs, reference: LogProbs | None = None) -> Nats:
        """orpo of the averaged log-probs."""
        mean = _averaged(policy)
        return orpo(mean.chosen, mean.rejected, beta=self.beta)

    def rewards(self, policy: LogProbs, reference: LogProbs | None = None) -> tuple[Nats, Nats]:
        """beta * averaged log-probs, as TRL logs them."""
        return _scaled(self.beta, _averaged(policy))


def cpo(chosen: Nats, rejected: Nats, nll: Nats, *, beta: float, nll_weight: float) -> Nats:
    """-log sigmoid(beta (chosen - rejected)) + nll_weight * nll, in nats; nll is the chosen answer's negative log-likelihood
    (Xu et al. 2024, arXiv 2401.08417, eq. 3 and the term L_NLL that follows it)."""
    return nll_weight * nll - F.logsigmoid(beta * (chosen - rejected))


class Cpo(_PairLoss, frozen=True, tag="cpo"):
    """Contrastive preference optimization: DPO with a uniform reference, held in place by fine-tuning on the chosen answers.

    The fine-tuning term is each pair's own mean over the chosen answer's tokens, so that a batch is the mean of its pairs.
    """

    uses_reference: ClassVar[bool] = False

    nll_weight: NonNegative = 1.0

    def __call__(self, policy: LogProbs, reference: LogProbs | None = None) -> Nats:
        """cpo of the summed log-probs, with the averaged negative log-likelihood."""
        nll = -_averaged(policy).chosen
        return cpo(policy.chosen, policy.rejected, nll, beta=self.beta, nll_weight=self.nll_weight)

    def rewards(self, policy: LogProbs, reference: LogProbs | None = None) -> tuple[Nats, Nats]:
        """beta * summed log-probs, as TRL logs them."""
        return _scaled(self.beta, policy)


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
    """w sigmoid(-+ beta (policy - ref - max(kl, 0))), minus for desirable answers and plus for others, in [0, w]: lambda_y - v of
    Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 8); kl [nats], the mean log-ratio of mismatched answers, gets no gradient."""
    gain = beta * (policy - ref - kl.detach().clamp(min=0.0))
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


class Kto(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="kto", tag_field="kind"):
    """Kahneman-Tversky optimization: answers are judged one by one, each against the reference point kl."""

    uses_reference: ClassVar[bool] = True

    beta: Positive = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0

    def __call__(self, policy: Nats, reference: Nats, desirable: Bool[Tensor, "*rows"], kl: Float[Tensor, ""]) -> Nats:
        """kto of the summed log-probs, one value an answer."""
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return kto(policy, reference, desirable, kl, beta=self.beta, **weights)

    def rewards(self, policy: Nats, reference: Nats) -> Nats:
        """beta * log(policy / reference), in nats."""
        return self.beta * (policy - reference)


def log1mexp(x: Nats) -> Nats:
    """log(1 - exp(x)) for log-probabilities x <= 0 (Maechler 2012, eq. 7); a probability within rounding of 1 or above counts as
    1 - eps, so that the value is at least log(eps) and the gradient finite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _answers(policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return policy.chosen, policy.rejected, reference.chosen, reference.rejected


def _averaged(x: LogProbs) -> LogProbs:
    return x._replace(chosen=x.chosen / x.n_chosen.clamp(min=1), rejected=x.rejected / x.n_rejected.clamp(min=1))


def _scaled(beta: float, x: LogProbs) -> tuple[Tensor, Tensor]:
    return beta * x.chosen, beta * x.rejected


def _present(reference: LogProbs | None) -> LogProbs:
    if reference is None:
        raise TypeError("losses: the reference is None, expected LogProbs; this loss compares the policy with a frozen model")
    return reference


class _Distillation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """(1 - ratio) * cross-entropy + ratio * divergence from a teacher, in nats, one value a row."""

    temperature: Positive = 1.0
    ratio: Share = 1.0

    def divergence(self, student_logits: Logits, teacher_logits: Logits, temperature: float) -> Nats:
        """The divergence at a temperature, times the temperature squared."""
        raise NotImplementedError

    def __call__(self, logits: Logits, targets: Int[Tensor, "*rows"], teacher_logits: Logits) -> Nats:
        """The mixture, given all of the teacher's logits."""
        return self._mixture(logits, targets, self.divergence(logits, teacher_logits, self.temperature))

    def on_top(
        self,
        logits: Logits,
        targets: Int[Tensor, "*rows"],
        top_ids: Int[Tensor, "*rows k"],
        top_logps: Float[Tensor, "*rows k"],
    ) -> Nats:
        """The mixture, given the teacher's log-probs of k tokens at this temperature: all other tokens count as one class.

        Merging classes never raises a divergence (log sum inequality, Cover & Thomas 2006, section 2.7): this is a lower bound
        of the whole one, and equal to it when k = V. The teacher's mass of the others is known to the rounding of top_logps.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        ids = top_ids.long()
        student, teacher = wide.gather(-1, ids), top_logps.to(wide.dtype)
        if ids.shape[-1] < logits.shape[-1]:  # else there is no other token, hence no class of them
            others = wide.scatter(-1, ids, -math.inf)
            student = torch.cat([student, others.logsumexp(-1, keepdim=True)], dim=-1)
            teacher = torch.cat([teacher, log1mexp(teacher.logsumexp(-1, keepdim=True))], dim=-1)
        nats = self.temperature**2 * self.divergence(student, teacher, 1.0)
        return self._mixture(logits, targets, nats)

    def _mixture(self, logits: Tensor, targets: Tensor, nats: Tensor) -> Tensor:
        if self.ratio == 1.0:
            return nats
        return (1 - self.ratio) * cross_entropy(logits, targets) + self.ratio * nats


def forward_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float) -> Nats:
    """T^2 sum_v p_v (log p_v - log q_v), p and q the teacher's and the student's softmax(logits / T), in nats (Hinton et al.
    2015, arXiv 1503.02531, section 2: T^2 keeps the gradient's size when T changes); in float32 or wider, one value a row."""
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(teacher, student)


class ForwardKL(_Distillation, frozen=True, tag="forward_kl"):
    """KL(teacher || student): the student covers all that the teacher does."""

    def divergence(self, student_logits: Logits, teacher_logits: Logits, temperature: float) -> Nats:
        """forward_kl."""
        return forward_kl(student_logits, teacher_logits, temperature=temperature)


def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float) -> Nats:
    """T^2 sum_v q_v (log q_v - log p_v), with p, q and T^2 as in forward_kl, in nats (Gu et al. 2023, arXiv 2306.08543, eq. 1,
    for each token of given text); in float32 or wider, one value a row."""
    return forward_kl(teacher_logits, student_logits, temperature=temperature)


class ReverseKL(_Distillation, frozen=True, tag="reverse_kl"):
    """KL(student || teacher): the student keeps to what the teacher finds likely."""

    def divergence(self, student_logits: Logits, teacher_logits: Logits, temperature: float) -> Nats:
        """reverse_kl."""
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)


def symmetric_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float) -> Nats:
    """(forward_kl + reverse_kl) / 2 = T^2 / 2 sum_v (p_v - q_v) (log p_v - log q_v), in nats (half of Jeffreys'
    divergence); in float32 or wider, one value a row."""
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return 0.5 * temperature**2 * ((teacher.exp() - student.exp()) * (teacher - student)).sum(-1)


class SymmetricKL(_Distillation, frozen=True, tag="symmetric_kl"):
    """The mean of both directions."""

    def divergence(self, student_logits: Logits, teacher_logits: Logits, temperature: float) -> Nats:
        """symmetric_kl."""
        return symmetric_kl(student_logits, teacher_logits, temperature=temperature)


def jensen_shannon(student_logits: Logits, teacher_logits: Logits, *, temperature: float, weight: float) -> Nats:
    """T^2 (w KL(p || m) + (1 - w) KL(q || m)), m = w p + (1 - w) q, with p, q and T^2 as in forward_kl, in nats (Agarwal et al.
    2023, arXiv 2306.13649, eq. 1, where w is beta); 0 < w < 1; in float32 or wider, one value a row."""
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    mixture = torch.logaddexp(teacher + math.log(weight), student + math.log1p(-weight))
    return temperature**2 * (weight * _kl(teacher, mixture) + (1 - weight) * _kl(student, mixture))


class JensenShannon(_Distillation, frozen=True, tag="jensen_shannon"):
    """The mean divergence of teacher and student from their mixture, at most log 2 a token at temperature 1 and weight 0.5."""

    weight: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5

    def divergence(self, student_logits: Logits, teacher_logits: Logits, temperature: float) -> Nats:
        """jensen_shannon."""
        return jensen_shannon(student_logits, teacher_logits, temperature=temperature, weight=self.weight)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


TokenLoss = CrossEntropy
PairLoss = Dpo | Ipo | Hinge | SimPO | Orpo | Cpo
AnswerLoss = Kto
DistillationLoss = ForwardKL | ReverseKL | SymmetricKL | JensenShannon
Loss = TokenLoss | PairLoss | AnswerLoss | DistillationLoss
