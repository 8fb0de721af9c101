"""The load-balancing loss as a term of an objective, against the loss that transformers trains on."""

from functools import partial

import pytest
import torch

from minitune import models
from minitune.algorithms.load_balancing import balanced
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama, mixtral, olmoe
from minitune.types import Batch
from support.experts import fused, small_experts
from support.models import SMALL, random_batch, random_params, reference

SFT = partial(sft, loss=CrossEntropy(), lora=None)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("n_remat", [0, 1, 9])
def test_loss_and_gradients_are_those_of_transformers(name: str, n_remat: int) -> None:
    config = small_experts(name)
    params, tokens = random_params(config), random_batch(config, 3, 13).tokens
    hf = reference(config, params)
    hf.router_aux_loss_coef = 0.7
    hf(tokens, labels=tokens, output_router_logits=True).loss.backward()
    model = Model(models.FAMILIES[name], config, n_remat=n_remat)
    ones = torch.ones_like(tokens)
    objective = balanced(SFT, model, 0.7)
    (mean, readings), grads = value_and_grad(lambda t: objective(t, params, Batch(tokens, ones, ones > 0)), has_aux=True)(params)
    our_grads = fused({key: g / mean.weight for key, g in grads.items()})
    wanted = {key: p.grad for key, p in hf.named_parameters()}
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert {key: float((our_grads[key] - g).abs().max()) / scale for key, g in wanted.items()} == pytest.approx(
        dict.fromkeys(our_grads, 0.0), abs=3e-5
    )
    plain, _ = SFT(model)({}, params, Batch(tokens, ones, ones > 0))
    torch.testing.assert_close(mean.value(), plain.value() + 0.7 * readings["load_balance"].value())
    assert mean.weight == plain.weight
    assert float(readings["load_balance"].value()) >= config.experts.n_active - 1e-5


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_blocks_computed_again_give_the_same_term_and_gradients_to_the_last_bit(name: str) -> None:
    config = small_experts(name)
    params, batch = random_params(config), random_batch(config, 3, 17)

    def evaluated(n_remat: int) -> object:
        objective = balanced(SFT, Model(models.FAMILIES[name], config, n_remat=n_remat), 0.7)
        return value_and_grad(lambda t: objective(t, params, batch), has_aux=True)(params)

    kept = evaluated(0)
    for n_remat in (1, config.n_layers):
        torch.testing.assert_close(evaluated(n_remat), kept, rtol=0, atol=0)


def test_padding_and_the_mask_of_targets_do_not_count_as_tokens_without_a_document() -> None:
    config = small_experts("mixtral")
    params, batch = random_params(config), random_batch(config, 3, 17)
    objective = balanced(SFT, Model(mixtral.FAMILY, config), 1.0)
    _, readings = objective({}, params, batch)
    other = batch._replace(tokens=torch.where(batch.segment_ids > 0, batch.tokens, (batch.tokens + 1) % 17))
    assert not torch.equal(other.tokens, batch.tokens)
    _, again = objective({}, params, other)
    torch.testing.assert_close(again["load_balance"].value(), readings["load_balance"].value())


def test_with_deltas_the_term_reaches_the_router_and_what_lies_before_it() -> None:
    config = small_experts("olmoe")
    params, batch = random_params(config), random_batch(config, 3, 17)
    lora = Lora(rank=2, alpha=2.0, targets=("*mlp.gate.weight", "*q_proj.weight"))
    deltas = lora.init(params, 0)
    objective = balanced(lambda model: sft(model, lora), Model(olmoe.FAMILY, config), 100.0)
    _, grads = value_and_grad(lambda t: objective(t, params, batch), has_aux=True)(deltas)
    plain = sft(Model(olmoe.FAMILY, config), lora)
    _, without = value_and_grad(lambda t: plain(t, params, batch), has_aux=True)(deltas)
    reached = {name for name in deltas if not torch.allclose(grads[name].b, without[name].b, rtol=1e-3)}
    assert reached == set(deltas)


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    with pytest.raises(InputError, match="load_balancing: the model has no experts, expected a family such as mixtral"):
        balanced(SFT, Model(llama.FAMILY, SMALL), 0.1)
