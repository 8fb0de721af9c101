"""What every member of a registry must keep: losses, optimizers, schedules, stages, families. Being listed is being tested."""

from typing import Any, get_args, get_type_hints

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune import models, tree
from minitune.algorithms.registry import OBJECTIVES
from minitune.data.source import Source
from minitune.io.paths import locate
from minitune.losses.preference import ApoDown
from minitune.losses.registry import DistillationLoss, Loss, PairLoss, TokenLoss, UnpairedLoss
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim import registry
from minitune.optim.schedules import Schedule
from minitune.programs.stages.stage import Stage
from minitune.types import LogProbs
from support.independent import members


def smallest(kind: type) -> Any:
    """A member decoded from a TOML-like table of its tag and its required fields."""
    config = kind.__struct_config__
    table: dict[str, Any] = {config.tag_field: config.tag}
    table |= {name: 0.1 for name in kind.__struct_fields__ if name == "lr"}
    return msgspec.convert(table, kind)


def test_a_loss_belongs_to_one_group() -> None:
    groups = [kind for group in (TokenLoss, PairLoss, UnpairedLoss, DistillationLoss) for kind in members(group)]
    assert groups == members(Loss)
    assert len({kind.__struct_config__.tag for kind in groups}) == len(groups)


def calls_of(kind: type, n: int, generator: torch.Generator) -> list[tuple[Any, tuple[torch.Tensor, ...], Any]]:
    """Every way to call a loss on n rows: (function of tensors, random tensors with a row each, what all rows share)."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def kto(policy: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        return loss(policy, reference, desirable > 0, kl)

    def pairs(policy: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor, _: None) -> torch.Tensor:
        return loss(*(LogProbs(*answers.T, *(1 + counts.abs()).T) for answers in (policy, reference)))

    loss, targets = smallest(kind), torch.randint(0, 5, (n,), generator=generator)
    if kind in members(PairLoss):
        return [(pairs, (randn(n, 2), randn(n, 2), randn(n, 2)), None)]
    if kind in members(UnpairedLoss):
        return [(kto, (randn(n), randn(n), randn(n)), torch.tensor(0.5))]
    if kind in members(TokenLoss):
        return [(lambda logits, y, _: loss(logits, y), (randn(n, 5), targets), None)]
    ids = randn(n, 5).argsort(-1)[:, :3]
    top = 0.7 * randn(n, 5).softmax(-1).gather(-1, ids)
    return [
        (lambda logits, y, teacher, _: loss(logits, y, teacher), (randn(n, 5), targets, randn(n, 5)), None),
        (lambda logits, y, ids, p, _: loss.on_top(logits, y, ids, p.log()), (randn(n, 5), targets, ids, top), None),
    ]


@pytest.mark.parametrize("kind", members(Loss))
@given(n=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_a_loss_is_one_finite_value_a_row_and_each_row_is_its_own(kind: type, n: int, seed: int) -> None:
    for loss, rows, shared in calls_of(kind, n, torch.Generator().manual_seed(seed)):
        nats = loss(*rows, shared)
        assert nats.shape == (n,)
        assert torch.isfinite(loss(500 * rows[0], *rows[1:], shared)).all()
        torch.testing.assert_close(nats, torch.cat([loss(*(x[i : i + 1] for x in rows), shared) for i in range(n)]))
        jacobian = torch.func.jacrev(lambda x, f=loss, rest=rows[1:], shared=shared: f(x, *rest, shared))(rows[0])
        assert not jacobian[~torch.eye(n, dtype=torch.bool)].any()
        assert jacobian.any()


@pytest.mark.parametrize("kind", members(Loss))
@given(n=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_a_step_down_a_loss_goes_where_its_name_says(kind: type, n: int, seed: int) -> None:
    """Towards the chosen answer and away from the rejected one, towards the target, towards the teacher."""
    generator, loss = torch.Generator().manual_seed(seed), smallest(kind)

    def negative(*shape: int) -> torch.Tensor:
        return -0.1 - torch.rand(shape, generator=generator)

    start, counts = negative(n, 2), torch.ones(2, n)
    if kind in members(PairLoss):  # from where training begins: the policy is the reference
        reference = LogProbs(*start.T, *counts)
        slope = torch.func.grad(lambda x: loss(LogProbs(*x.T, *counts), reference).sum())(start)
        falls = f"{kind.__name__} falls as the {{}} answer becomes {{}} likely, expected {{}}; a sign is wrong"
        if kind is not ApoDown:  # which is indifferent to the chosen answer there: test_losses.py
            assert (slope[:, 0] < 0).all(), falls.format("chosen", "less", "more")
        assert (slope[:, 1] > 0).all(), falls.format("rejected", "more", "less")
    elif kind in members(UnpairedLoss):
        desirable = torch.rand(n, generator=generator) < 0.5
        slope = torch.func.grad(lambda x: loss(x, start[:, 0], desirable, torch.tensor(0.0)).sum())(start[:, 0])
        assert torch.equal(slope < 0, desirable)
        assert slope.all()
    elif kind in members(TokenLoss):
        logits, targets = torch.randn(n, 5, generator=generator), torch.randint(0, 5, (n,), generator=generator)
        slope = torch.func.grad(lambda x: loss(x, targets).sum())(logits)
        assert (slope.gather(1, targets[:, None]) < 0).all()
    else:
        student, teacher = (torch.randn(n, 5, generator=generator) for _ in range(2))
        targets = torch.zeros(n, dtype=torch.int64)
        nearer = student + 0.1 * (teacher - student)
        values = [loss(x, targets, teacher) for x in (student, nearer, teacher)]
        assert (values[2] <= values[1] + 1e-6).all()
        assert (values[1] < values[0]).all()


@pytest.mark.parametrize("kind", members(Loss))
def test_a_loss_is_its_table(kind: type) -> None:
    loss = smallest(kind)
    assert msgspec.convert(msgspec.to_builtins(loss), Loss) == loss
    assert kind.__doc__
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields


@pytest.mark.parametrize("kind", members(Loss))
def test_a_loss_declares_what_trains_it_and_what_it_needs(kind: type) -> None:
    assert kind.objective in OBJECTIVES
    assert kind.formats
    assert set(kind.formats) <= set(get_args(get_type_hints(Source)["format"]))
    assert kind.compares_answers == hasattr(kind, "rewards") == (kind in members(PairLoss) + members(UnpairedLoss))
    assert kind.needs_teacher == hasattr(kind, "on_top") == (kind in members(DistillationLoss))
    assert kind.compares_answers or not kind.needs_reference
    assert kind.rows_per_sample == (2 if kind in members(PairLoss) else 1)


@pytest.mark.parametrize("kind", members(registry.Optimizer))
def test_an_optimizer_descends_keeps_its_state_shape_and_is_proportional_to_its_rate(kind: type) -> None:
    rule = smallest(kind)
    params = {
        "w": torch.tensor([3.0, -2.0]),
        "deep": (torch.tensor(1.5),),
        "matrix": torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]]),
    }
    state, first = rule.init(params), params
    structure = [(path, leaf.shape, leaf.dtype) for path, leaf in tree.items(state)]
    for _ in range(200):
        updates, state = rule.update(params, state, params)  # the gradient of |w|^2 / 2 is w
        params = tree.add(params, updates)
    assert [(path, leaf.shape, leaf.dtype) for path, leaf in tree.items(state)] == structure
    assert float(tree.norm(params)) < 0.1 * float(tree.norm(first))
    double = msgspec.structs.replace(rule, lr=2 * rule.lr)
    one, two = (r.update(first, r.init(first), first)[0] for r in (rule, double))
    torch.testing.assert_close(tree.map(lambda u: 2 * u, one), two)
    assert not any(u.any() for u in tree.leaves(msgspec.structs.replace(rule, lr=0.0).update(first, rule.init(first), first)[0]))


@pytest.mark.parametrize("kind", members(Schedule))
@given(warmup=st.integers(0, 9), total=st.integers(1, 30))
def test_a_schedule_rises_to_its_peak_and_never_rises_again(kind: type, warmup: int, total: int) -> None:
    schedule = kind(warmup_steps=warmup)
    factors = [float(schedule.factor(torch.tensor(t), total)) for t in range(total)]
    assert all(0.0 <= f <= 1.0 for f in factors)
    assert factors[0] > 0
    rise, fall = factors[: warmup + 1], factors[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert total <= warmup or factors[warmup] == 1.0


@pytest.mark.parametrize("kind", members(Stage))
def test_a_stage_has_a_tag_a_label_and_a_docstring(kind: type) -> None:
    assert kind.__struct_config__.tag_field == "op"
    assert kind.__doc__
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields
    assert kind.run.__doc__


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    config = models.open_config(locate("configs/models/demo.toml")).config
    model = Model(llama.FAMILY, config)
    one, same, other = model.init(0), model.init(0), model.init(1)
    assert {name: w.shape for name, w in one.items()} == {name: torch.Size(shape) for name, shape in model.shapes().items()}
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if not name.endswith("norm.weight")]
    assert all(not torch.equal(one[name], other[name]) for name in drawn)
    q, o = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qo")
    assert float(one[q].std()) == pytest.approx(0.02, rel=0.05)
    assert float(one[o].std()) == pytest.approx(0.02 / (2 * config.n_layers) ** 0.5, rel=0.05)
