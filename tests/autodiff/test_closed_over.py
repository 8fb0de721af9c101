"""Functions that close over what trains: its gradient is right, or a sentence says why it is not taken."""

from collections.abc import Callable

import pytest
import torch

from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import ClosedOverError, per_example, value_and_grad
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.types import Batch, Mean
from support.models import SMALL, random_batch, random_params


def tempered(model: Model, batch: Batch, by_extra: bool) -> Callable[..., Mean]:
    """Mean loss of (temperature, weights that train with it): the loss closes over the temperature, or gets it as rows."""

    frozen = random_params(SMALL, 3, torch.float64)

    def objective(leaves: dict[str, torch.Tensor], rows: Batch = batch) -> Mean:
        params = {**frozen, **{n: w for n, w in leaves.items() if n != "t"}}
        if by_extra:
            own = leaves["t"].expand(*rows.tokens.shape, 1)
            nats = model.token_losses(params, rows, lambda y, ids, t: CrossEntropy()(y * t, ids), own, summed=True)
        else:
            nats = model.token_losses(params, rows, lambda y, ids: CrossEntropy()(y * leaves["t"], ids), summed=True)
        return Mean.of(nats, rows.target_mask())

    return objective


@pytest.mark.parametrize("by_extra", [False, True])
@pytest.mark.parametrize("names", [(), ("model.norm.weight",), ("lm_head.weight",), ("model.norm.weight", "lm_head.weight")])
def test_a_leaf_that_a_loss_closes_over_or_is_handed_has_its_gradient(by_extra: bool, names: tuple[str, ...]) -> None:
    params, batch = random_params(SMALL, 3, torch.float64), random_batch(SMALL, 3, 9)
    objective = tempered(Model(llama.FAMILY, SMALL), batch, by_extra)
    leaves = {"t": torch.tensor(1.3, dtype=torch.float64), **{name: params[name] for name in names}}
    found = value_and_grad(objective)(leaves)[1]
    wanted = torch.func.grad(lambda x: objective(x).total)(leaves)
    step = 1e-5
    ends = [objective({**leaves, "t": leaves["t"] + h}).total for h in (-step, step)]
    torch.testing.assert_close(found["t"], (ends[1] - ends[0]) / (2 * step), rtol=1e-6, atol=0.0)
    for name in leaves:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


def test_a_loss_that_closes_over_a_leaf_has_gradients_of_each_example() -> None:
    batch = random_batch(SMALL, 3, 9)
    objective = tempered(Model(llama.FAMILY, SMALL), batch, by_extra=False)
    leaves = {"t": torch.tensor(1.3, dtype=torch.float64)}
    _, each = per_example(lambda x, row: objective(x, Batch(*(y[None] for y in row))), chunk=2)(leaves, batch)
    torch.testing.assert_close(each["t"].sum(), value_and_grad(objective)(leaves)[1]["t"])


def test_remat_refuses_what_it_would_give_no_gradient() -> None:
    x = torch.randn(3, 4)

    def scaled(leaves: dict[str, torch.Tensor], row: torch.Tensor = x) -> Mean:
        return Mean(remat(lambda y: (y * leaves["t"]).sum())(row), torch.ones(()))

    leaves = {"t": torch.tensor(1.3)}
    with pytest.raises(ClosedOverError, match="grad: a function depends on a tensor that requires grad, expected it among"):
        value_and_grad(scaled)(leaves)
    with pytest.raises(ClosedOverError, match="expected it among its arguments"):
        per_example(scaled, chunk=2)(leaves, x)
    torch.testing.assert_close(torch.func.grad(lambda t: scaled({"t": t}).total)(leaves["t"]), x.sum())


def test_no_gradient_is_taken_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"grad: torch\.inference_mode is on"):
        value_and_grad(lambda x: Mean(x, x))(torch.tensor(1.0))
