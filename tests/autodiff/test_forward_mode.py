"""Forward mode: every operator of minitune has the directional derivative that reverse mode gives, or is not used there."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from minitune import models, tree
from minitune.algorithms.quantization_aware import quantization_aware
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.compile import wrap
from minitune.nn.attention import blockwise
from minitune.optim import SGD, ClipByGlobalNorm, chain
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Int8, Scheme
from minitune.steps import train_step
from support.closeness import assert_trees_close
from support.families import config_of, sized
from support.models import model_of, random_batch, random_deltas, random_params

# torch scripts some of its rules for forward mode, which it deprecates itself, and warns of its own graph
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def jvp(f: Callable[[tree.Tree], torch.Tensor], at: tree.Tree, along: tree.Tree) -> torch.Tensor:
    return torch.func.jvp(f, (at,), (along,))[1]


def linearize(f: Callable[[tree.Tree], torch.Tensor], at: tree.Tree, along: tree.Tree) -> torch.Tensor:
    return torch.func.linearize(f, at)[1](along)


def dual_level(f: Callable[[tree.Tree], torch.Tensor], at: tree.Tree, along: tree.Tree) -> torch.Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(tree.map(forward_ad.make_dual, at, along))).tangent
        assert tangent is not None
        return tangent


def directions(at: tree.Tree) -> tree.Tree:
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), at)


def check(
    objective: Any, trainable: tree.Tree, params: Any, batch: Any, tolerance: float = 1e-9, modes: Any = (jvp, dual_level)
) -> None:
    def total(leaves: tree.Tree) -> torch.Tensor:
        return objective(leaves, params, batch)[0].total

    along = directions(trainable)
    grads = value_and_grad(lambda leaves: objective(leaves, params, batch)[0])(trainable)[1]
    true = sum((g * v).sum() for g, v in zip(tree.leaves(grads), tree.leaves(along), strict=True))
    for forward in modes:
        found = forward(total, trainable, along)
        assert abs(float(found - true)) <= tolerance * max(1.0, abs(float(true))), forward.__name__


@pytest.mark.parametrize("name", sorted(models.FAMILIES))
def test_forward_mode_is_reverse_mode_for_every_family(name: str) -> None:
    config = config_of(name)
    params = random_params(config, 3, torch.float64)
    objective = sft(model_of(config)._replace(n_remat=1), None)
    check(objective, dict(params), params, random_batch(config, 2, 9))


def test_linearize_is_reverse_mode() -> None:  # of one small model: it traces a graph for half a minute
    config = sized("llama", n_layers=1)
    params, rule = random_params(config, 3, torch.float64), Lora(2, 4.0, ("*.o_proj.weight",))
    deltas = random_deltas(params, rule)
    check(sft(model_of(config), rule), deltas, params, random_batch(config, 1, 4), modes=(linearize,))


@pytest.mark.parametrize("scheme", [NF4(), Int8()])
@pytest.mark.parametrize("dora", [False, True])
def test_forward_mode_is_reverse_mode_over_a_quantized_base(scheme: Scheme, dora: bool) -> None:
    config = sized("llama", n_layers=2, d_ff=14)
    dense = random_params(config, 3)
    params, rule = Quantization(scheme).quantize(dense), Lora(2, 4.0, ("*_proj.weight",), dora=dora)
    check(sft(model_of(config), rule), random_deltas(dense, rule), params, random_batch(config, 2, 9), tolerance=2e-3)


def test_forward_mode_is_reverse_mode_under_quantization_aware_training_and_in_16_bits() -> None:
    config = sized("llama", n_layers=2)
    params, batch = random_params(config, 3), random_batch(config, 2, 9)
    model = model_of(config)
    check(quantization_aware(sft(model, None), Quantization(Int8()).fake), dict(params), params, batch, tolerance=2e-3)

    rule = Lora(2, 4.0, ("*_proj.weight",))
    narrow = tree.map(lambda x: x.bfloat16(), params)
    check(sft(model, rule), random_deltas(params, rule), narrow, batch, tolerance=5e-2)


def test_a_hessian_times_a_vector_is_the_same_forward_over_reverse_and_reverse_over_reverse() -> None:
    config = sized("llama", n_layers=2)
    params, batch = random_params(config, 3, torch.float64), random_batch(config, 2, 7)
    rule = Lora(2, 4.0, ("*_proj.weight",))
    objective, deltas = sft(Model(models.FAMILIES["llama"], config), rule), random_deltas(params, rule)
    along = directions(deltas)

    def gradient(leaves: tree.Tree) -> tree.Tree:
        return value_and_grad(lambda x: objective(x, params, batch)[0])(leaves)[1]

    def slope(leaves: tree.Tree) -> torch.Tensor:
        grads = torch.func.grad(lambda x: objective(x, params, batch)[0].total)(leaves)
        return sum((g * v).sum() for g, v in zip(tree.leaves(grads), tree.leaves(along), strict=True))

    wanted = torch.func.grad(slope)(deltas)
    assert_trees_close(torch.func.jvp(gradient, (deltas,), (along,))[1], wanted, 1e-9)
    with forward_ad.dual_level():
        grads = gradient(tree.map(forward_ad.make_dual, deltas, along))
        assert_trees_close(tree.map(lambda g: forward_ad.unpack_dual(g).tangent, grads), wanted, 1e-9)


def test_a_step_is_differentiated_like_any_function() -> None:
    config = sized("llama", n_layers=1)
    params, batch, rule = random_params(config, 3, torch.float64), random_batch(config, 2, 7), Lora(2, 4.0, ("*.q_proj.weight",))
    step = train_step(sft(model_of(config), rule), chain(ClipByGlobalNorm(0.5), SGD(lr=0.1)))
    begun = step.init(tree.map(torch.Tensor.double, random_deltas(params, rule)))
    weights, along = tree.map(torch.sin, begun.trainable), directions(begun.trainable)

    def after(leaves: tree.Tree) -> torch.Tensor:
        trained = step.update(params, begun._replace(trainable=leaves), batch)[0].trainable
        return sum((x * w).sum() for x, w in zip(tree.leaves(trained), tree.leaves(weights), strict=True))

    ends = [after(tree.map(lambda x, v, sign=sign: x + sign * 1e-6 * v, begun.trainable, along)) for sign in (1, -1)]
    wanted = float(ends[0] - ends[1]) / 2e-6
    assert float(jvp(after, begun.trainable, along)) == pytest.approx(wanted, rel=1e-6)
    grads = torch.func.grad(after)(begun.trainable)
    found = sum(float((g * v).sum()) for g, v in zip(tree.leaves(grads), tree.leaves(along), strict=True))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_compiled_block_is_not_asked_in_forward_mode() -> None:
    calls: list[str] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        calls.append("itself")
        return x * x

    with mock.patch("minitune.models.compile._compiled", lambda block: lambda x: calls.append("compiled") or block(x)):
        run = wrap(print)(block)
        run(torch.tensor(2.0))
        assert calls == ["compiled", "itself"]
        assert float(jvp(run, torch.tensor(3.0), torch.tensor(1.0))) == 6.0
        assert calls == ["compiled", "itself", "itself"]


def test_an_operator_without_a_rule_for_forward_mode_says_so() -> None:
    q = torch.randn(1, 2, 5, 4)

    def attended(q: torch.Tensor) -> torch.Tensor:
        return blockwise.attend(q, q, q, None, None, scale=0.5, soft_cap=None).sum()

    with pytest.raises(RuntimeError, match="attention: blocks have no rule for forward mode"):
        dual_level(attended, q, torch.ones_like(q))
