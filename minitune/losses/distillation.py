"""Losses that compare a student with a teacher, token by token."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minitune.losses.base import BaseLoss, Logits, Nats, ObjectiveName, log1mexp
from minitune.losses.token import cross_entropy
from minitune.types import OpenUnitInterval, PositiveFloat, UnitInterval, widen


class Distillation(BaseLoss, frozen=True):
    """(1 - ratio) * cross-entropy + ratio * divergence from a teacher, in nats, one value a row."""

    objective: ClassVar[ObjectiveName] = "distillation"
    formats: ClassVar[tuple[str, ...]] = ("instruct", "chat", "text")
    needs_teacher: ClassVar[bool] = True

    # of both softmaxes: above 1 the teacher's unlikely tokens count for more
    temperature: PositiveFloat = 1.0
    # share of the divergence; the rest is cross-entropy with the data's own tokens
    ratio: UnitInterval = 1.0

    def divergence(
        self, student_logits: Logits, teacher_logits: Logits, temperature: float
    ) -> Nats:
        """Divergence at a temperature, times the temperature squared."""
        raise NotImplementedError

    def __call__(
        self,
        logits: Float[Tensor, "*rows V"],
        targets: Int[Tensor, "*rows"],
        teacher_logits: Float[Tensor, "*rows teacher_V"],
    ) -> Nats:
        """Mixture, given all of the teacher's logits.

        One tokenizer may be padded to different sizes: the logits that only one of the models has
        belong to no token, and are left out.
        """
        n = min(logits.shape[-1], teacher_logits.shape[-1])
        student, teacher = logits[..., :n], teacher_logits[..., :n]
        return self._mixture(student, targets, self.divergence(student, teacher, self.temperature))

    def on_top(
        self,
        logits: Logits,
        targets: Int[Tensor, "*rows"],
        top_ids: Int[Tensor, "*rows k"],
        top_logps: Float[Tensor, "*rows k"],
    ) -> Nats:
        """Mixture, given the teacher's log-probs of k tokens at this temperature: all other
        tokens count as one class.

        Merging classes never raises a divergence (log sum inequality, Cover & Thomas 2006, section
        2.7): this is a lower bound of the whole one, and equal to it when k = V. The teacher's mass
        of the others is known to the rounding of top_logps.
        """
        wide = widen(logits) / self.temperature
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
    """T^2 sum_v p_v (log p_v - log q_v), p and q the teacher's and the student's softmax(logits /
    T), in nats (Hinton et al. 2015, arXiv 1503.02531, section 2: T^2 keeps the gradient's size when
    T changes); in float32 or wider, one value a row.
    """
    student, teacher = (
        _log_softmax(student_logits, temperature),
        _log_softmax(teacher_logits, temperature),
    )
    return temperature**2 * _kl(teacher, student)


class ForwardKL(Distillation, frozen=True, tag="forward_kl"):
    """KL(teacher || student): the student covers all that the teacher does."""

    def divergence(
        self, student_logits: Logits, teacher_logits: Logits, temperature: float
    ) -> Nats:
        """forward_kl."""
        return forward_kl(student_logits, teacher_logits, temperature=temperature)


def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float) -> Nats:
    """T^2 sum_v q_v (log q_v - log p_v), with p, q and T^2 as in forward_kl, in nats (Gu et al.
    2023, arXiv 2306.08543, eq. 1, for each token of given text); in float32 or wider, one value a
    row.
    """
    return forward_kl(teacher_logits, student_logits, temperature=temperature)


class ReverseKL(Distillation, frozen=True, tag="reverse_kl"):
    """KL(student || teacher): the student keeps to what the teacher finds likely."""

    def divergence(
        self, student_logits: Logits, teacher_logits: Logits, temperature: float
    ) -> Nats:
        """reverse_kl."""
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)


def symmetric_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float) -> Nats:
    """(forward_kl + reverse_kl) / 2 = T^2 / 2 sum_v (p_v - q_v) (log p_v - log q_v), in nats (half
    of Jeffreys' divergence); in float32 or wider, one value a row.
    """
    student, teacher = (
        _log_softmax(student_logits, temperature),
        _log_softmax(teacher_logits, temperature),
    )
    return 0.5 * temperature**2 * ((teacher.exp() - student.exp()) * (teacher - student)).sum(-1)


class SymmetricKL(Distillation, frozen=True, tag="symmetric_kl"):
    """Mean of both directions."""

    def divergence(
        self, student_logits: Logits, teacher_logits: Logits, temperature: float
    ) -> Nats:
        """symmetric_kl."""
        return symmetric_kl(student_logits, teacher_logits, temperature=temperature)


def jensen_shannon(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float, weight: float
) -> Nats:
    """T^2 (w KL(p || m) + (1 - w) KL(q || m)), m = w p + (1 - w) q, with p, q and T^2 as in
    forward_kl, in nats (Agarwal et al. 2023, arXiv 2306.13649, eq. 1, where w is beta); 0 < w < 1;
    in float32 or wider, one value a row.
    """
    student, teacher = (
        _log_softmax(student_logits, temperature),
        _log_softmax(teacher_logits, temperature),
    )
    mixture = torch.logaddexp(teacher + math.log(weight), student + math.log1p(-weight))
    return temperature**2 * (weight * _kl(teacher, mixture) + (1 - weight) * _kl(student, mixture))


class JensenShannon(Distillation, frozen=True, tag="jensen_shannon"):
    """Mean divergence of teacher and student from their mixture, at most log 2 a token at
    temperature 1 and weight 0.5.
    """

    # of the teacher in the mixture: towards 0 it acts as forward_kl, towards 1 as reverse_kl
    weight: OpenUnitInterval = 0.5

    def divergence(
        self, student_logits: Logits, teacher_logits: Logits, temperature: float
    ) -> Nats:
        """jensen_shannon."""
        return jensen_shannon(
            student_logits, teacher_logits, temperature=temperature, weight=self.weight
        )


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(widen(logits) / temperature, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
