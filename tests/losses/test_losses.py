"""Losses against their closed forms, torch's own divergences, and what must hold for any answers or logits."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitune.losses.base import log1mexp
from minitune.losses.distillation import (
    forward_kl,
    jensen_shannon,
    reverse_kl,
    symmetric_kl,
)
from minitune.losses.preference import apo_down, cpo, dpo, hinge, ipo, orpo, simpo
from minitune.losses.registry import DistillationLoss, PairLoss
from minitune.losses.token import CrossEntropy, cross_entropy
from minitune.losses.unpaired import Kto, kto
from minitune.types import LogProbs
from support.independent import members

pytestmark = pytest.mark.fast

seeds = st.integers(0, 2**32)
betas = st.sampled_from([0.05, 0.3, 1.0, 2.5])
smoothings = st.sampled_from([0.0, 0.1, 0.5, 0.8, 1.0])
temperatures = st.sampled_from([0.5, 1.0, 1.7, 4.0])
REFERRING: dict[str, Callable[..., Tensor]] = {  # four log-probs in, beta as a knob
    "dpo": lambda *x, beta: dpo(*x, beta=beta, label_smoothing=0.0),
    "dpo smoothed": lambda *x, beta: dpo(*x, beta=beta, label_smoothing=0.2),
    "ipo": ipo,
    "hinge": hinge,
}
FREE: dict[str, Callable[..., Tensor]] = {  # two log-probs in
    "simpo": lambda c, r, *, beta: simpo(c, r, beta=beta, gamma=0.7),
    "orpo": orpo,
    "cpo": lambda c, r, *, beta: cpo(c, r, -c, beta=beta, nll_weight=0.6),
}
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "symmetric": symmetric_kl,
    "jensen_shannon": lambda s, t, *, temperature: jensen_shannon(s, t, temperature=temperature, weight=0.5),
    "jensen_shannon 0.2": lambda s, t, *, temperature: jensen_shannon(s, t, temperature=temperature, weight=0.2),
}
DISTILLATIONS: list[Any] = members(DistillationLoss)
PAIRED: list[Any] = members(PairLoss)


def drawn(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(seed: int, n: int = 5) -> LogProbs:
    """Answers of 1 to 9 tokens at about 1.3 nats each."""
    lengths = torch.randint(1, 10, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    sums = -(0.1 + drawn(seed, 2, n, scale=1.0).abs()) * 1.3 * lengths
    return LogProbs(*sums, *lengths)


def gradients(loss: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in args]
    return torch.autograd.grad(loss(*leaves).sum(), leaves)


# --- preference ---------------------------------------------------------------------------------------------------------------


@given(seed=seeds, beta=betas, s=smoothings)
def test_at_the_reference_dpo_is_log_2_and_the_others_what_a_margin_of_0_gives(seed: int, beta: float, s: float) -> None:
    c, r = drawn(seed, 2, 5)
    same = torch.full((5,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(dpo(c, r, c, r, beta=beta, label_smoothing=s), same)
    torch.testing.assert_close(hinge(c, r, c, r, beta=beta), torch.ones_like(same))
    torch.testing.assert_close(ipo(c, r, c, r, beta=beta), torch.full_like(same, 1 / (2 * beta) ** 2))
    torch.testing.assert_close(simpo(c, c, beta=beta, gamma=0.0), same)
    torch.testing.assert_close(orpo(-c.abs() - 0.1, -c.abs() - 0.1, beta=beta), c.abs() + 0.1 + beta * math.log(2))
    torch.testing.assert_close(cpo(c, c, r, beta=beta, nll_weight=0.5), same + 0.5 * r)


@pytest.mark.parametrize("name", REFERRING)
@given(seed=seeds, beta=betas)
def test_what_policy_and_reference_share_changes_nothing(name: str, seed: int, beta: float) -> None:
    answers, shift, other = drawn(seed, 4, 5), drawn(seed + 1, 5), drawn(seed + 2, 5)
    moved = answers + torch.stack([shift, other, shift, other])  # an answer's own shift, in policy and reference alike
    torch.testing.assert_close(REFERRING[name](*moved, beta=beta), REFERRING[name](*answers, beta=beta))
    both = answers + torch.stack([shift, shift, other, other])  # a prompt's own shift, in chosen and rejected alike
    torch.testing.assert_close(REFERRING[name](*both, beta=beta), REFERRING[name](*answers, beta=beta))


@given(seed=seeds, beta=betas, step=st.floats(1e-3, 30.0))
def test_a_larger_margin_never_costs_more(seed: int, beta: float, step: float) -> None:
    c, r, rc, rr = drawn(seed, 4, 7)
    assert (dpo(c + step, r, rc, rr, beta=beta, label_smoothing=0.0) < dpo(c, r, rc, rr, beta=beta, label_smoothing=0.0)).all()
    assert (dpo(c + step, r, rc, rr, beta=beta, label_smoothing=1.0) > dpo(c, r, rc, rr, beta=beta, label_smoothing=1.0)).all()
    assert (hinge(c + step, r, rc, rr, beta=beta) <= hinge(c, r, rc, rr, beta=beta)).all()
    assert (simpo(c, r - step, beta=beta, gamma=0.3) < simpo(c, r, beta=beta, gamma=0.3)).all()
    assert (cpo(c, r - step, -c, beta=beta, nll_weight=1.0) < cpo(c, r, -c, beta=beta, nll_weight=1.0)).all()
    negative = -r.abs() - 0.1
    assert (orpo(-c.abs(), negative - step, beta=beta) <= orpo(-c.abs(), negative, beta=beta)).all()
    near = ((c - rc) - (r - rr) - 1 / (2 * beta)).abs()  # ipo wants its margin, and no more: it falls towards it from both sides
    order = near.argsort()
    assert (ipo(c, r, rc, rr, beta=beta)[order].diff() >= 0).all()
    target = rc + (r - rr) + 1 / (2 * beta)
    torch.testing.assert_close(ipo(target, r, rc, rr, beta=beta), torch.zeros_like(c), atol=1e-20, rtol=0)


@given(seed=seeds, beta=betas, s=smoothings)
def test_smoothed_labels_are_swapped_labels(seed: int, beta: float, s: float) -> None:
    c, r, rc, rr = drawn(seed, 4, 5)
    swapped = dpo(r, c, rr, rc, beta=beta, label_smoothing=1 - s)
    torch.testing.assert_close(dpo(c, r, rc, rr, beta=beta, label_smoothing=s), swapped)
    clean, flipped = (dpo(c, r, rc, rr, beta=beta, label_smoothing=x) for x in (0.0, 1.0))
    torch.testing.assert_close(dpo(c, r, rc, rr, beta=beta, label_smoothing=s), (1 - s) * clean + s * flipped)


@given(seed=seeds, beta=betas, s=smoothings)
def test_gradients_are_the_closed_forms(seed: int, beta: float, s: float) -> None:
    answers = drawn(seed, 4, 6)
    c, r, rc, rr = answers
    margin = (c - rc) - (r - rr)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]  # of the four answers in the margin

    slope = beta * (torch.sigmoid(beta * margin) - (1 - s))
    grads = gradients(lambda *x: dpo(*x, beta=beta, label_smoothing=s), *answers)
    torch.testing.assert_close(torch.stack(grads), signs * slope)
    grads = gradients(lambda *x: ipo(*x, beta=beta), *answers)
    torch.testing.assert_close(torch.stack(grads), signs * 2 * (margin - 1 / (2 * beta)))
    grads = gradients(lambda *x: hinge(*x, beta=beta), *answers)
    torch.testing.assert_close(torch.stack(grads), signs * -beta * (beta * margin < 1))

    slope = -beta * torch.sigmoid(0.7 - beta * (c - r))
    grads = gradients(lambda *x: simpo(*x, beta=beta, gamma=0.7), c, r)
    torch.testing.assert_close(torch.stack(grads), signs[:2] * slope)
    grads = gradients(lambda *x: cpo(*x, beta=beta, nll_weight=0.6), c, r, rc)
    slope = -beta * torch.sigmoid(-beta * (c - r))
    torch.testing.assert_close(torch.stack(grads), torch.stack([slope, -slope, torch.full_like(c, 0.6)]))


@given(seed=seeds, beta=betas)
def test_steps_down_apo_down_lower_both_answers_and_the_rejected_one_more(seed: int, beta: float) -> None:
    """Where apo_zero raises the chosen one. At the reference it is indifferent to the chosen answer."""
    ref = drawn(seed, 2, 5)
    chosen, rejected = gradients(lambda c, r: apo_down(c, r, *ref, beta=beta), *ref)
    torch.testing.assert_close(chosen, torch.zeros_like(chosen))
    assert (rejected > 0).all()
    now = ref.clone()
    for _ in range(20):
        now -= torch.stack(gradients(lambda c, r: apo_down(c, r, *ref, beta=beta), *now)) / beta**2
    assert (now[0] < ref[0]).all()
    assert (now[1] - ref[1] < now[0] - ref[0]).all()


@given(seed=seeds, beta=betas)
def test_orpo_is_the_log_odds_ratio_of_probabilities(seed: int, beta: float) -> None:
    c, r = -0.01 - drawn(seed, 2, 6).abs()
    p, q = c.exp(), r.exp()
    log_odds = torch.log(p / (1 - p)) - torch.log(q / (1 - q))
    torch.testing.assert_close(orpo(c, r, beta=beta), -c + beta * torch.log1p((-log_odds).exp()))
    pull = beta * torch.sigmoid(-log_odds)
    grads = gradients(lambda *x: orpo(*x, beta=beta), c, r)
    torch.testing.assert_close(torch.stack(grads), torch.stack([-1 - pull / (1 - p), pull / (1 - q)]))


@given(x=st.floats(-600.0, -1e-12))
def test_log1mexp_keeps_its_digits(x: float) -> None:
    expected = math.log(-math.expm1(x)) if x > -0.1 else math.log1p(-math.exp(x))
    value = log1mexp(torch.tensor([x], dtype=torch.float64))
    torch.testing.assert_close(value, torch.tensor([expected], dtype=torch.float64), rtol=1e-13, atol=0.0)
    (slope,) = gradients(log1mexp, torch.tensor([x], dtype=torch.float64))
    assert float(slope) == pytest.approx(-1 / math.expm1(-x), rel=1e-12)


@given(seed=seeds, beta=betas, kl=st.floats(-2.0, 4.0), wins=st.floats(0.1, 2.0), costs=st.floats(0.1, 2.0))
def test_kto_is_prospect_theory(seed: int, beta: float, kl: float, wins: float, costs: float) -> None:
    policy, ref = drawn(seed, 2, 7)
    desirable = torch.arange(7) % 3 != 0
    knobs = {"beta": beta, "desirable_weight": wins, "undesirable_weight": costs}
    point = torch.tensor(kl, dtype=torch.float64)
    value, z = beta * (policy - ref), beta * max(kl, 0.0)
    good, bad = wins * (1 - torch.sigmoid(value - z)), costs * (1 - torch.sigmoid(z - value))
    torch.testing.assert_close(kto(policy, ref, desirable, point, **knobs), torch.where(desirable, good, bad))

    grad = gradients(lambda p: kto(p, ref, desirable, point, **knobs), policy)[0]
    slope = beta * torch.sigmoid(value - z) * torch.sigmoid(z - value)
    torch.testing.assert_close(grad, torch.where(desirable, -wins * slope, costs * slope))
    leaf = point.clone().requires_grad_()
    loss = kto(policy.requires_grad_(), ref, desirable, leaf, **knobs).sum()
    assert torch.autograd.grad(loss, leaf, allow_unused=True) == (None,)
    at = kto(policy, policy + kl, desirable, torch.tensor(-kl, dtype=torch.float64), **knobs)
    if kl <= 0:  # at the reference point half of each weight is lost
        torch.testing.assert_close(at.detach(), torch.where(desirable, wins / 2, costs / 2).double())


EXTREMES = torch.tensor([0.0, -1e-7, -1.0, -500.0, 500.0, -1e4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*REFERRING, *FREE])
def test_values_and_gradients_are_finite_at_the_extremes(name: str, dtype: torch.dtype) -> None:
    n, loss = (4, REFERRING[name]) if name in REFERRING else (2, FREE[name])
    answers = torch.cartesian_prod(*[EXTREMES.to(dtype)] * n).T
    for beta in (0.1, 2.5):
        assert torch.isfinite(loss(*answers, beta=beta)).all()
        assert all(torch.isfinite(g).all() for g in gradients(lambda *x, b=beta: loss(*x, beta=b), *answers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kto_is_finite_at_the_extremes(dtype: torch.dtype) -> None:
    policy, ref = torch.cartesian_prod(EXTREMES, EXTREMES).to(dtype).T
    for desirable in (torch.ones_like(policy).bool(), torch.zeros_like(policy).bool()):
        for kl in EXTREMES.to(dtype):

            def loss(p: Tensor, r: Tensor, d: Tensor = desirable, kl: Tensor = kl) -> Tensor:
                return kto(p, r, d, kl, beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)

            assert ((loss(policy, ref) >= 0) & (loss(policy, ref) <= 1.3)).all()
            assert all(torch.isfinite(g).all() for g in gradients(loss, policy, ref))


@pytest.mark.parametrize("kind", PAIRED)
def test_an_answer_without_tokens_is_no_division_by_zero(kind: Any) -> None:
    empty = LogProbs(*torch.zeros(4, 3))
    assert torch.isfinite(kind()(empty, empty)).all()


@pytest.mark.parametrize("kind", [kind for kind in PAIRED if kind.needs_reference])
def test_a_loss_that_compares_says_when_there_is_no_reference(kind: Any) -> None:
    for call in (kind(), kind().rewards):
        with pytest.raises(TypeError, match="losses: the reference is None, expected LogProbs; this loss compares the policy"):
            call(log_probs(0), None)


# --- distillation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=seeds, v=st.integers(2, 17), t=temperatures)
def test_a_divergence_grows_with_the_distance_and_is_zero_for_equal_distributions(name: str, seed: int, v: int, t: float) -> None:
    student, teacher = drawn(seed, 2, 5, v)
    nats = DIVERGENCES[name](student, teacher, temperature=t)
    distance = ((student / t).softmax(-1) - (teacher / t).softmax(-1)).abs().sum(-1) / 2
    least = {"jensen_shannon": 0.5, "jensen_shannon 0.2": 0.32}.get(name, 2.0)  # Pinsker: 2 w (1 - w) for a mixture's weight w
    assert (nats >= t**2 * least * distance.square() * (1 - 1e-9) - 1e-12).all()
    assert nats.any()
    shifted = student + drawn(seed + 1, 5, 1, scale=50.0)
    torch.testing.assert_close(DIVERGENCES[name](shifted, teacher, temperature=t), nats)
    same = DIVERGENCES[name](shifted, student, temperature=t)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)


@given(seed=seeds, v=st.integers(2, 17), t=temperatures, w=st.sampled_from([0.05, 0.5, 0.9]))
def test_divergences_are_torchs_own_times_the_temperature_squared(seed: int, v: int, t: float, w: float) -> None:
    student, teacher = drawn(seed, 2, 3, 5, v)  # any leading shape
    p, q = (torch.distributions.Categorical(logits=x / t) for x in (teacher, student))
    kl = torch.distributions.kl_divergence
    mixture = torch.distributions.Categorical(probs=w * p.probs + (1 - w) * q.probs)
    forward, reverse = t**2 * kl(p, q), t**2 * kl(q, p)
    torch.testing.assert_close(forward_kl(student, teacher, temperature=t), forward)
    torch.testing.assert_close(reverse_kl(student, teacher, temperature=t), reverse)
    torch.testing.assert_close(symmetric_kl(student, teacher, temperature=t), (forward + reverse) / 2)
    expected = t**2 * (w * kl(p, mixture) + (1 - w) * kl(q, mixture))
    torch.testing.assert_close(jensen_shannon(student, teacher, temperature=t, weight=w), expected)
    torchs = F.kl_div(F.log_softmax(student / t, -1), F.softmax(teacher / t, -1), reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher, temperature=t), t**2 * torchs)


@given(seed=seeds, v=st.integers(2, 17), t=temperatures)
def test_gradients_of_divergences_are_the_closed_forms(seed: int, v: int, t: float) -> None:
    student, teacher = drawn(seed, 2, 5, v)
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    m = (p + q) / 2
    (grad,) = gradients(lambda s: forward_kl(s, teacher, temperature=t), student)
    forward = t * (q - p)
    torch.testing.assert_close(grad, forward)
    (grad,) = gradients(lambda s: reverse_kl(s, teacher, temperature=t), student)
    log_ratio = (q / p).log()
    reverse = t * q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(grad, reverse)
    (grad,) = gradients(lambda s: symmetric_kl(s, teacher, temperature=t), student)
    torch.testing.assert_close(grad, (forward + reverse) / 2)
    (grad,) = gradients(lambda s: jensen_shannon(s, teacher, temperature=t, weight=0.5), student)
    log_ratio = (q / m).log() / 2
    torch.testing.assert_close(grad, t * q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True)))


@given(seed=seeds, v=st.integers(2, 17), t=temperatures)
def test_jensen_shannon_is_symmetric_at_a_half_and_at_most_log_2(seed: int, v: int, t: float) -> None:
    student, teacher = drawn(seed, 2, 5, v, scale=40.0)
    nats = jensen_shannon(student, teacher, temperature=t, weight=0.5)
    torch.testing.assert_close(nats, jensen_shannon(teacher, student, temperature=t, weight=0.5))
    assert (nats <= t**2 * math.log(2) * (1 + 1e-12)).all()
    far, limit = 1e3 * torch.eye(2, dtype=torch.float64), torch.full((2,), t**2 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(jensen_shannon(far, -far, temperature=t, weight=0.5), limit)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=seeds, v=st.integers(3, 17))
def test_the_temperature_squared_keeps_the_gradients_size(name: str, seed: int, v: int) -> None:
    """Hinton et al. 2015, eq. 4: at a high temperature the gradient tends to one that has no temperature in it."""
    student, teacher = drawn(seed, 2, 4, v, scale=1.0)
    hot, hotter = (gradients(lambda s, t=t: DIVERGENCES[name](s, teacher, temperature=t), student)[0] for t in (1e5, 2e5))
    torch.testing.assert_close(hot, hotter, rtol=1e-3, atol=1e-4)
    centred = [x - x.mean(-1, keepdim=True) for x in (student, teacher)]
    weight = {"jensen_shannon": 0.25, "jensen_shannon 0.2": 0.16}.get(name, 1.0)  # w (1 - w) of a divergence's curvature
    torch.testing.assert_close(hotter, weight * (centred[0] - centred[1]) / v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_finite_and_wide_at_500_nats(name: str, dtype: torch.dtype) -> None:
    student, teacher = (500 * drawn(seed, 9, 7, scale=1.0).clamp(-1, 1).sign().to(dtype) for seed in (0, 1))
    for t in (0.5, 1.0, 4.0):
        nats = DIVERGENCES[name](student, teacher, temperature=t)
        assert nats.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.isfinite(nats).all()
        assert torch.isfinite(gradients(lambda s, t=t: DIVERGENCES[name](s, teacher, temperature=t), student)[0]).all()


@pytest.mark.parametrize("kind", DISTILLATIONS)
@given(seed=seeds, v=st.integers(2, 17), t=temperatures, ratio=st.floats(0.0, 1.0))
def test_the_mixture_runs_from_cross_entropy_to_divergence(kind: Any, seed: int, v: int, t: float, ratio: float) -> None:
    student, teacher = drawn(seed, 2, 5, v)
    targets = torch.arange(5) % v
    hard, soft = cross_entropy(student, targets), kind().divergence(student, teacher, t)
    assert torch.equal(kind(temperature=t, ratio=0.0)(student, targets, teacher), hard)
    assert torch.equal(kind(temperature=t)(student, targets, teacher), soft)
    torch.testing.assert_close(kind(temperature=t, ratio=ratio)(student, targets, teacher), (1 - ratio) * hard + ratio * soft)


def top(teacher: Tensor, t: float, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest ids and their log-probs at a temperature."""
    logps, ids = F.log_softmax(teacher / t, -1).topk(k)
    return ids, logps


@pytest.mark.parametrize("kind", DISTILLATIONS)
@given(seed=seeds, v=st.integers(2, 11), t=temperatures)
def test_the_top_of_a_teacher_bounds_the_whole_from_below(kind: Any, seed: int, v: int, t: float) -> None:
    student, teacher = drawn(seed, 2, 5, v).clamp(-4, 4)  # a rest of less than 1e-7 would be known to few digits
    targets, loss = torch.arange(5) % v, kind(temperature=t)
    whole = loss(student, targets, teacher)
    by_k = torch.stack([loss.on_top(student, targets, *top(teacher, t, k)) for k in range(1, v + 1)])
    assert (by_k.diff(dim=0) >= -1e-7 * (1 + whole)).all()  # more classes, more to tell apart
    torch.testing.assert_close(by_k[-1], whole)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed))
    ids, logps = top(teacher, t, v)
    torch.testing.assert_close(loss.on_top(student, targets, ids[:, order].int(), logps[:, order]), whole)
    mixed = kind(temperature=t, ratio=0.3).on_top(student, targets, *top(teacher, t, 1))
    torch.testing.assert_close(mixed, 0.7 * cross_entropy(student, targets) + 0.3 * by_k[0])


@pytest.mark.parametrize("kind", DISTILLATIONS)
@given(seed=seeds, v=st.integers(3, 11), t=temperatures)
def test_the_top_is_the_divergence_of_merged_probabilities(kind: Any, seed: int, v: int, t: float) -> None:
    student, teacher = drawn(seed, 2, 5, v).clamp(-4, 4)
    k = v - 2
    ids, logps = top(teacher, t, k)

    def merged(logits: Tensor) -> Tensor:
        p = (logits / t).softmax(-1)
        return torch.cat([p.gather(-1, ids), p.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1).log()

    targets = torch.arange(5) % v
    divergence = kind(temperature=t).on_top(student, targets, ids, logps)
    expected = t**2 * kind().divergence(merged(student), merged(teacher), 1.0)
    torch.testing.assert_close(divergence, expected, rtol=1e-7, atol=1e-9)
    (slope,) = gradients(lambda s: kind(temperature=t).on_top(s, targets, ids, logps), student)
    (other,) = gradients(lambda s: t**2 * kind().divergence(merged(s), merged(teacher), 1.0), student)
    torch.testing.assert_close(slope, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", DISTILLATIONS)
@given(seed=seeds, v=st.integers(2, 11), scale=st.sampled_from([1.0, 30.0, 500.0]))
def test_a_rest_without_mass_is_no_nan(kind: Any, dtype: torch.dtype, seed: int, v: int, scale: float) -> None:
    student, teacher = drawn(seed, 2, 5, v, scale=1.0).clamp(-1, 1).mul(scale).to(dtype)
    targets, loss = torch.arange(5) % v, kind(ratio=0.8)
    for k in range(1, v + 1):
        ids, logps = top(teacher.float(), 1.0, k)
        assert torch.isfinite(loss.on_top(student, targets, ids, logps)).all()
        (slope,) = gradients(lambda s, ids=ids, logps=logps: loss.on_top(s, targets, ids, logps), student)
        assert torch.isfinite(slope).all()
    whole = loss(student, targets, teacher)
    torch.testing.assert_close(loss.on_top(student, targets, *top(teacher.float(), 1.0, v)), whole, rtol=1e-4, atol=1e-4)


# --- every loss ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(seed=seeds)
def test_vmap_over_any_loss_is_a_loop(seed: int) -> None:
    n, v = 3, 7
    answers, logits = -drawn(seed, 4, n, 5).abs() - 0.01, drawn(seed + 1, 2, n, 5, v)
    targets, desirable, kl = torch.arange(5 * n).view(n, 5) % v, torch.arange(5 * n).view(n, 5) % 2 == 0, drawn(seed, n)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [(loss, tuple(answers)) for loss in REFERRING.values()]
    calls = [(lambda *x, f=f: f(*x, beta=0.3), x) for f, x in calls]
    calls += [(lambda *x, f=f: f(*x, beta=0.3), tuple(answers[:2])) for f in FREE.values()]
    calls += [(lambda *x, f=f: f(*x, temperature=1.7), tuple(logits)) for f in DIVERGENCES.values()]
    calls += [(cross_entropy, (logits[0], targets)), (Kto(), (answers[0], answers[1], desirable, kl))]
    for kind in DISTILLATIONS:
        calls += [(kind(ratio=0.4), (logits[0], targets, logits[1]))]
        calls += [(kind(ratio=0.4).on_top, (logits[0], targets, *top(logits[1], 1.0, k))) for k in (3, v)]
    for kind in PAIRED:  # the reference: half of the policy's log-probs

        def paired(c: Tensor, r: Tensor, n_c: Tensor, n_r: Tensor, loss: Any = kind) -> Tensor:
            return loss()(LogProbs(c, r, n_c, n_r), LogProbs(c / 2, r / 2, n_c, n_r))

        calls += [(paired, (*answers[:2], *(1 - answers[2:])))]
    for loss, args in calls:
        looped = torch.stack([loss(*(x[i] for x in args)) for i in range(n)])
        torch.testing.assert_close(torch.func.vmap(loss)(*args), looped)
        whole = torch.func.vmap(torch.func.grad(lambda *x, f=loss: f(*x).sum()))(*args)
        rows = [torch.func.grad(lambda *x, f=loss: f(*x).sum())(*(x[i] for x in args)) for i in range(n)]
        torch.testing.assert_close(whole, torch.stack(rows))


@pytest.mark.parametrize(
    "text",
    [
        "{kind: dpo, beta: 0}",
        "{kind: dpo, label_smoothing: 1.5}",
        "{kind: simpo, gamma: -1}",
        "{kind: cpo, nll_weight: -1}",
        "{kind: kto, desirable_weight: -1}",
        "{kind: forward_kl, temperature: 0}",
        "{kind: reverse_kl, ratio: 1.1}",
        "{kind: jensen_shannon, weight: 1}",
        "{kind: ipo, betta: 1}",
    ],
)
def test_a_knob_out_of_range_is_refused(text: str) -> None:
    raw = dict(pair.split(": ") for pair in text.strip("{}").split(", "))
    table = {key: value if key == "kind" else float(value) for key, value in raw.items()}
    kinds = {kind.__struct_config__.tag: kind for kind in [*PAIRED, Kto, *DISTILLATIONS]}
    with pytest.raises(msgspec.ValidationError, match=r"Expected `float`|unknown field `betta`"):
        msgspec.convert(table, kinds[table["kind"]])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_smoothed_labels_are_torchs_and_the_z_loss_is_its_square(smoothing: float, z: float) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 3, 10, 7, 3])
    wanted = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing) + z * logits.logsumexp(-1) ** 2
    torch.testing.assert_close(CrossEntropy(label_smoothing=smoothing, z_loss=z)(logits, targets), wanted)
