"""Every loss, optimizer and schedule equals its definition in other words, or another library. Being listed is being compared."""

from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

from minitune import hardware, tree
from minitune.losses.registry import DistillationLoss, Loss, PairLoss, TokenLoss, UnpairedLoss
from minitune.optim.registry import Optimizer
from minitune.optim.schedules import Schedule
from minitune.types import LogProbs
from support.independent import LOSSES, OPTIMIZERS, SCHEDULES, entry_of, members

SEEDS = st.integers(0, 2**32)
LISTS = [(Loss, LOSSES, "LOSSES"), (Optimizer, OPTIMIZERS, "OPTIMIZERS"), (Schedule, SCHEDULES, "SCHEDULES")]
CASES = [(kind, table, name) for union, table, name in LISTS for kind in members(union)]


@pytest.mark.parametrize(("kind", "table", "name"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_a_member_has_a_reference_that_sets_every_knob(kind: type, table: Any, name: str) -> None:
    knobs = entry_of(kind, table, name).knobs
    default = {field.name: field.default for field in msgspec.structs.fields(kind)}
    said_elsewhere = {"warmup_steps"} if name == "SCHEDULES" else set()
    assert set(knobs) == set(default) - said_elsewhere, f"{name} of {kind.__name__} leaves a knob out, or has one too many"
    unset = [knob for knob, value in knobs.items() if value == default[knob]]
    assert not unset, f"{name} of {kind.__name__} has the default of {unset}, expected another value: a default shows nothing"


def test_a_member_without_a_reference_is_named() -> None:
    with pytest.raises(AssertionError, match=r"independent.py: LOSSES has no entry for dict, expected .* add one"):
        entry_of(dict, LOSSES, "LOSSES")


def drawn(seed: int, *shape: int) -> Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(seed: int, n: int) -> tuple[Tensor, LogProbs]:
    """Leaves that are log-probs of chosen and rejected answers of 1 to 6 tokens, and the struct made of them."""
    counts = torch.randint(1, 7, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    sums = (-0.1 - drawn(seed, 2, n).abs() * counts).requires_grad_()
    return sums, LogProbs(*sums, *counts)


def assert_one_function(ours: Tensor, wanted: Tensor, leaf: Tensor) -> None:
    """Equal values, and equal gradients of their sums."""
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf, retain_graph=True) for x in (ours, wanted)))


@pytest.mark.parametrize("kind", members(PairLoss))
@given(n=st.integers(1, 7), seed=SEEDS)
def test_a_loss_of_pairs_is_its_definition(kind: type, n: int, seed: int) -> None:
    knobs, value, rewards = entry_of(kind, LOSSES, "LOSSES")
    loss, (leaf, policy), (_, reference) = kind(**knobs), answers(seed, n), answers(seed + 1, n)
    frozen = LogProbs(*(x.detach() for x in reference))
    assert_one_function(loss(policy, frozen), value(policy, frozen, **knobs), leaf)
    torch.testing.assert_close(loss.rewards(policy, frozen), rewards(policy, frozen, **knobs))
    if not loss.needs_reference:
        assert torch.equal(loss(policy, None), loss(policy, frozen))


@pytest.mark.parametrize("kind", members(UnpairedLoss))
@given(n=st.integers(1, 7), seed=SEEDS, kl=st.floats(-1.0, 2.0))
def test_a_loss_of_single_answers_is_its_definition(kind: type, n: int, seed: int, kl: float) -> None:
    knobs, value, rewards = entry_of(kind, LOSSES, "LOSSES")
    loss, leaf, reference = kind(**knobs), drawn(seed, n).requires_grad_(), drawn(seed + 1, n)
    rest = (reference, drawn(seed + 2, n) > 0, torch.tensor(kl, dtype=torch.float64))
    assert_one_function(loss(leaf, *rest), value(leaf, *rest, **knobs), leaf)
    torch.testing.assert_close(loss.rewards(leaf, reference), rewards(leaf, reference, **knobs))


@pytest.mark.parametrize("kind", members(TokenLoss))
@given(n=st.integers(1, 7), v=st.integers(2, 9), seed=SEEDS)
def test_a_loss_of_tokens_is_its_definition(kind: type, n: int, v: int, seed: int) -> None:
    knobs, value, _ = entry_of(kind, LOSSES, "LOSSES")
    leaf, targets = drawn(seed, n, v).requires_grad_(), torch.arange(n) % v
    assert_one_function(kind(**knobs)(leaf, targets), value(leaf, targets, **knobs), leaf)


@pytest.mark.parametrize("kind", members(DistillationLoss))
@given(n=st.integers(1, 7), v=st.integers(3, 9), seed=SEEDS)
def test_a_loss_that_compares_with_a_teacher_is_its_definition(kind: type, n: int, v: int, seed: int) -> None:
    """(1 - ratio) of cross-entropy, ratio times the temperature squared of a divergence; or of merged classes."""
    knobs, value, _ = entry_of(kind, LOSSES, "LOSSES")
    leaf, teacher, targets = drawn(seed, n, v).requires_grad_(), drawn(seed + 1, n, v), torch.arange(n) % v
    t, ratio = knobs["temperature"], knobs["ratio"]
    own = {name: knob for name, knob in knobs.items() if name not in ("temperature", "ratio")}
    theirs, ours = ((x / t).softmax(-1) for x in (teacher, leaf))
    ids = theirs.argsort(-1, descending=True)[:, : v - 2]

    def wanted(teacher: Tensor, student: Tensor) -> Tensor:
        hard = F.cross_entropy(leaf, targets, reduction="none")
        return (1 - ratio) * hard + ratio * t**2 * value(Categorical(probs=teacher), Categorical(probs=student), **own)

    def merged(p: Tensor) -> Tensor:
        return torch.cat([p.gather(-1, ids), p.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1)

    assert_one_function(kind(**knobs)(leaf, targets, teacher), wanted(theirs, ours), leaf)
    on_top = kind(**knobs).on_top(leaf, targets, ids, theirs.gather(-1, ids).log())
    assert_one_function(on_top, wanted(merged(theirs), merged(ours)), leaf)


@pytest.mark.parametrize("kind", members(Optimizer))
def test_an_optimizer_takes_the_steps_of_another_library(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: False)
    entry, generator = entry_of(kind, OPTIMIZERS, "OPTIMIZERS"), torch.Generator().manual_seed(3)
    params = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(entry.shapes)}
    start, leaves = params, {name: torch.nn.Parameter(x.clone()) for name, x in params.items()}
    rule, theirs = kind(**entry.knobs), entry.optimizer(list(leaves.values()))
    state = rule.init(params)
    for _ in range(8):
        grads = {name: torch.randn(x.shape, generator=generator) for name, x in params.items()}
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        theirs.step()
        updates, state = rule.update(grads, state, params)
        params = tree.add(params, updates)
    for name, leaf in leaves.items():
        moved, apart = leaf.detach() - start[name], params[name] - leaf.detach()
        assert float(apart.norm()) <= entry.share * float(moved.norm()), name


@pytest.mark.parametrize("kind", members(Schedule))
@settings(max_examples=10)
@given(warmup=st.integers(0, 9), n=st.integers(2, 30))
def test_a_schedule_is_its_curve(kind: type, warmup: int, n: int) -> None:
    knobs, factor = entry_of(kind, SCHEDULES, "SCHEDULES")
    schedule = kind(warmup_steps=warmup, **knobs)
    wanted = [(t + 1) / warmup for t in range(warmup)] + [factor(t, n) for t in range(n)]
    assert [float(schedule.factor(torch.tensor(t), warmup + n)) for t in range(warmup + n)] == pytest.approx(wanted)
