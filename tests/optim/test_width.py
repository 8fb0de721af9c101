"""Sums, optimizer states and steps are float32 or wider, whatever the dtype of the weights."""

from typing import Any, get_args

import msgspec
import pytest
import torch

from minitune import tree
from minitune.autodiff.value_and_grad import accumulate
from minitune.optim.adamw import AdamW
from minitune.optim.apply import apply_gradients
from minitune.optim.registry import Optimizer
from minitune.optim.sgd import SGD

ONE = torch.tensor(1.0, dtype=torch.float64)


def stepped(rule: Any, grads: Any, state: Any, params: Any, donate: bool = False) -> tuple[Any, Any]:
    return apply_gradients(rule, grads, state, params, divisor=ONE, norm=ONE, is_finite=torch.tensor(True), donate=donate)


def test_gradients_in_bfloat16_are_summed_in_float32() -> None:
    parts = torch.randn(512, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = accumulate(lambda i: {"w": parts[i], "n": torch.tensor(1)}, range(512))
    assert total["w"].dtype == torch.float32
    assert total["n"] == 512
    torch.testing.assert_close(total["w"], parts.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    assert accumulate(lambda i: parts[i], [3]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", get_args(Optimizer))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_of_an_optimizer_is_float32_or_wider(kind: type, dtype: torch.dtype) -> None:
    rule = msgspec.convert({"kind": kind.__struct_config__.tag, "lr": 0.1}, kind)
    state = rule.init({"w": torch.ones(3, 4, dtype=dtype)})
    wide = {leaf.dtype for leaf in tree.leaves(state) if leaf.is_floating_point()}
    assert wide <= {torch.float32, torch.float64}
    _, after = stepped(rule, {"w": torch.ones(3, 4, dtype=dtype)}, state, {"w": torch.ones(3, 4, dtype=dtype)})
    assert [leaf.dtype for leaf in tree.leaves(after)] == [leaf.dtype for leaf in tree.leaves(state)]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("sums", [torch.bfloat16, torch.float32])
def test_a_step_of_weights_in_bfloat16_is_the_one_in_float32_rounded_once(sums: torch.dtype, donate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for rule in (AdamW(lr=0.01, weight_decay=0.1), SGD(lr=0.01, momentum=0.9, weight_decay=0.1)):
        params = {"w": torch.randn(7, 5, generator=generator).bfloat16()}
        wide, state = {"w": params["w"].float()}, rule.init(params)
        wide_state = rule.init(wide)
        for _ in range(4):
            grads = {"w": torch.randn(7, 5, generator=generator).to(sums)}
            wide = {"w": params["w"].float()}
            params, state = stepped(rule, grads, state, params, donate)
            wide, wide_state = stepped(rule, {"w": grads["w"].float()}, wide_state, wide)
            torch.testing.assert_close(params["w"].float(), wide["w"], rtol=2**-8, atol=1e-6)
            for one, other in zip(tree.leaves(state), tree.leaves(wide_state), strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("donate", [False, True])
def test_a_float64_step_is_torchs_to_the_last_digits(donate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    rule, params, theirs = AdamW(lr=1e-3), {"w": start.clone()}, torch.nn.Parameter(start.clone())
    torch_rule, state = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0), rule.init(params)
    for _ in range(5):
        theirs.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        params, state = stepped(rule, {"w": theirs.grad.clone()}, state, params, donate)
        torch_rule.step()
    change = (theirs.detach() - start).abs().max()
    assert float((params["w"] - theirs.detach()).abs().max() / change) < 1e-12


def test_a_step_of_leaves_that_require_grad_carries_no_graph() -> None:
    params = {"w": torch.randn(5, requires_grad=True)}
    for rule in (AdamW(lr=0.1), SGD(lr=0.1)):
        new, state = stepped(rule, {"w": torch.ones(5)}, rule.init(params), params)
        assert not any(leaf.requires_grad for leaf in tree.leaves((new, state)))
