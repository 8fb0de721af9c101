"""What each loss, optimizer and schedule is compared with: its definition in other words, or another library.

A new member of a union needs an entry in one of these tables, and nothing else: the contract tests
walk over the unions and look their members up here. An entry sets every knob to a value that is not
its default, so that no knob goes unread.
"""

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from minitune.losses.distillation import ForwardKL, JensenShannon, ReverseKL, SymmetricKL
from minitune.losses.preference import ApoDown, ApoZero, Cpo, Dpo, Hinge, Ipo, Orpo, SimPO
from minitune.losses.token import CrossEntropy
from minitune.losses.unpaired import Kto
from minitune.optim.adamw import AdamW
from minitune.optim.eight_bit import AdamW8bit
from minitune.optim.muon import Muon
from minitune.optim.schedules import Constant, Cosine, InverseSqrt, Linear, Wsd
from minitune.optim.sgd import SGD
from minitune.types import LogProbs


def members(union: Any) -> list[type]:
    """The types of a union, of which there may be one."""
    return list(get_args(union)) or [union]


def entry_of(kind: type, table: Mapping[type, Any], name: str) -> Any:
    """The entry of a member, which the table called `name` must have."""
    if kind not in table:
        raise AssertionError(
            f"tests/support/independent.py: {name} has no entry for {kind.__name__}, expected its "
            "knobs and its definition in other words than minitune's, or another library; add one"
        )
    return table[kind]


# --- losses: knobs, and the value of each row in float64 ---


class LossReference(NamedTuple):
    """Knobs, a definition of the loss, and one of the implicit rewards where it has them."""

    knobs: dict[str, float]
    value: Callable[..., Tensor]
    rewards: Callable[..., Tensor | tuple[Tensor, Tensor]] | None = None


def preference(first: Tensor, second: Tensor) -> Tensor:
    """Probability that the first answer wins, from two scores (Bradley and Terry 1952)."""
    return first.exp() / (first.exp() + second.exp())


def odds(mean_logp: Tensor) -> Tensor:
    """p / (1 - p) of an answer whose tokens have this log-probability on average."""
    return mean_logp.exp() / (1 - mean_logp.exp())


def ratios(policy: LogProbs, reference: LogProbs) -> tuple[Tensor, Tensor]:
    """Log-ratios of the chosen and of the rejected answers."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def means(x: LogProbs) -> tuple[Tensor, Tensor]:
    """Log-probs a token of the chosen and of the rejected answers."""
    return x.chosen / x.n_chosen, x.rejected / x.n_rejected


def dpo(policy: LogProbs, reference: LogProbs, beta: float, label_smoothing: float) -> Tensor:
    chosen, rejected = ratios(policy, reference)
    p = preference(beta * chosen, beta * rejected)
    return -(1 - label_smoothing) * p.log() - label_smoothing * (1 - p).log()


def ipo(policy: LogProbs, reference: LogProbs, beta: float) -> Tensor:
    (c, r), (ref_c, ref_r) = means(policy), means(reference)
    return ((c - ref_c) - (r - ref_r) - 0.5 / beta) ** 2


def hinge(policy: LogProbs, reference: LogProbs, beta: float) -> Tensor:
    chosen, rejected = ratios(policy, reference)
    slack = 1 - beta * (chosen - rejected)
    return torch.where(slack > 0, slack, 0.0)


def apo_zero(policy: LogProbs, reference: LogProbs, beta: float) -> Tensor:
    """Two classifications against the reference: the probability of each being decided wrongly."""
    chosen, rejected = ratios(policy, reference)
    even = torch.zeros_like(chosen)
    return preference(even, beta * chosen) + preference(beta * rejected, even)


def apo_down(policy: LogProbs, reference: LogProbs, beta: float) -> Tensor:
    """Probabilities of two wrong choices: the chosen answer over the reference, the rejected one over the chosen."""
    chosen, rejected = ratios(policy, reference)
    return preference(beta * chosen, torch.zeros_like(chosen)) + preference(beta * rejected, beta * chosen)


def simpo(policy: LogProbs, _: LogProbs, beta: float, gamma: float) -> Tensor:
    chosen, rejected = means(policy)
    return -preference(beta * chosen - gamma, beta * rejected).log()


def orpo(policy: LogProbs, _: LogProbs, beta: float) -> Tensor:
    chosen, rejected = means(policy)
    ratio = odds(chosen) / odds(rejected)
    return -chosen - beta * (ratio / (1 + ratio)).log()


def cpo(policy: LogProbs, _: LogProbs, beta: float, nll_weight: float) -> Tensor:
    p = preference(beta * policy.chosen, beta * policy.rejected)
    return -p.log() - nll_weight * means(policy)[0]


def relative_rewards(policy: LogProbs, reference: LogProbs, beta: float, **_: float) -> Any:
    chosen, rejected = ratios(policy, reference)
    return beta * chosen, beta * rejected


def mean_rewards(policy: LogProbs, _: LogProbs, beta: float, **__: float) -> Any:
    chosen, rejected = means(policy)
    return beta * chosen, beta * rejected


def sum_rewards(policy: LogProbs, _: LogProbs, beta: float, **__: float) -> Any:
    return beta * policy.chosen, beta * policy.rejected


def kto(policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor, **knobs: float) -> Tensor:
    """lambda_y - v of the paper's eq. 8, a probability in place of its sigmoid."""
    gain, point = knobs["beta"] * (policy - reference), knobs["beta"] * kl.clamp(min=0.0)
    wins, costs = preference(gain, point), preference(point, gain)
    good, bad = knobs["desirable_weight"] * (1 - wins), knobs["undesirable_weight"] * (1 - costs)
    return torch.where(desirable, good, bad)


def kto_reward(policy: Tensor, reference: Tensor, beta: float, **_: float) -> Tensor:
    return beta * (policy - reference)


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    nats = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
    return nats + z_loss * logits.exp().sum(-1).log() ** 2


def jensen_shannon(teacher: Categorical, student: Categorical, weight: float) -> Tensor:
    mixed = Categorical(probs=weight * teacher.probs + (1 - weight) * student.probs)
    near, far = kl_divergence(teacher, mixed), kl_divergence(student, mixed)
    return weight * near + (1 - weight) * far


def symmetric_kl(teacher: Categorical, student: Categorical) -> Tensor:
    return (kl_divergence(teacher, student) + kl_divergence(student, teacher)) / 2


WARM = {"temperature": 1.7, "ratio": 0.3}
LOSSES: dict[type, LossReference] = {
    CrossEntropy: LossReference({"label_smoothing": 0.2, "z_loss": 0.03}, cross_entropy),
    Dpo: LossReference({"beta": 0.3, "label_smoothing": 0.2}, dpo, relative_rewards),
    Ipo: LossReference({"beta": 0.3}, ipo, relative_rewards),
    Hinge: LossReference({"beta": 0.3}, hinge, relative_rewards),
    ApoZero: LossReference({"beta": 0.3}, apo_zero, relative_rewards),
    ApoDown: LossReference({"beta": 0.3}, apo_down, relative_rewards),
    SimPO: LossReference({"beta": 0.7, "gamma": 0.4}, simpo, mean_rewards),
    Orpo: LossReference({"beta": 0.3}, orpo, mean_rewards),
    Cpo: LossReference({"beta": 0.3, "nll_weight": 0.4}, cpo, sum_rewards),
    Kto: LossReference({"beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.6}, kto, kto_reward),
    # divergences of a teacher's and a student's distribution, in this order
    ForwardKL: LossReference(WARM, kl_divergence),
    ReverseKL: LossReference(WARM, lambda teacher, student: kl_divergence(student, teacher)),
    SymmetricKL: LossReference(WARM, symmetric_kl),
    JensenShannon: LossReference({**WARM, "weight": 0.2}, jensen_shannon),
}


# --- optimizers: knobs, and another library's optimizer of the same leaves ---


ADAM: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
HEAVY: dict[str, Any] = {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1}
MUON: dict[str, Any] = {"lr": 0.02, "momentum": 0.8, "nesterov": False, "ns_steps": 3}
MUON |= {"weight_decay": 0.1, "adjust_lr_fn": "original"}


class OptimizerReference(NamedTuple):
    """Knobs, another optimizer of leaves "0", "1", ..., their shapes, and how near the two come."""

    knobs: dict[str, Any]
    optimizer: Callable[[Sequence[Tensor]], Any]
    shapes: Sequence[tuple[int, ...]] = ((7, 11), (5,), ())
    share: float = 1e-5  # of how far the leaves have moved


class TorchMuon:
    """torch.optim.Muon for the first leaf, in float32 products, and torch.optim.AdamW for the rest."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.first = torch.optim.Muon(leaves[:1], **MUON)
        self.rest = torch.optim.AdamW(leaves[1:], **{**ADAM, "lr": 0.01, "weight_decay": 0.1})

    def step(self) -> None:
        """Take a step; torch rounds what it multiplies by calling bfloat16(), which does nothing here."""
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            self.first.step()
        self.rest.step()


def bitsandbytes_adamw(leaves: Sequence[Tensor]) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, which keeps its moments in 8 bits."""
    import bitsandbytes  # here, because it takes seconds

    return bitsandbytes.optim.AdamW8bit(leaves, **ADAM, min_8bit_size=4096)


BESIDE_MUON = {"adamw": ("1",), "adamw_lr_factor": 0.5, "betas": ADAM["betas"], "eps": ADAM["eps"]}
OPTIMIZERS: dict[type, OptimizerReference] = {
    AdamW: OptimizerReference(ADAM, lambda leaves: torch.optim.AdamW(leaves, **ADAM)),
    AdamW8bit: OptimizerReference(ADAM, bitsandbytes_adamw, ((64, 129), (5,)), 5e-3),
    SGD: OptimizerReference(HEAVY, lambda leaves: torch.optim.SGD(leaves, **HEAVY)),
    Muon: OptimizerReference({**MUON, **BESIDE_MUON}, TorchMuon, ((7, 11), (9, 5), (5,)), 1e-4),
}


# --- schedules: knobs, and the factor of step t after the warm-up, of n steps in all after it ---


class ScheduleReference(NamedTuple):
    """Knobs, and the factor t steps after the warm-up, of the n steps that follow it."""

    knobs: dict[str, Any]
    factor: Callable[[int, int], float]


def wsd(t: int, n: int) -> float:
    """1 until three quarters of the steps are taken, then a line that would reach 0.2 at step n."""
    return 1.0 if t <= 0.75 * n else 1 - 0.8 * (t - 0.75 * n) / (0.25 * n)


def cosine(t: int, n: int) -> float:
    """The part of a turn that is behind, as the real part of a rotation."""
    return 0.2 + 0.8 * (1 + cmath.exp(1j * math.pi * t / n).real) / 2


SCHEDULES: dict[type, ScheduleReference] = {
    Constant: ScheduleReference({}, lambda t, n: 1.0),
    Linear: ScheduleReference({"end": 0.1}, lambda t, n: (0.1 * t + (n - t)) / n),
    Cosine: ScheduleReference({"end": 0.2}, cosine),
    Wsd: ScheduleReference({"end": 0.2, "decay_share": 0.25}, wsd),
    InverseSqrt: ScheduleReference({"timescale": 11}, lambda t, n: 1 / math.sqrt((11 + t) / 11)),
}
