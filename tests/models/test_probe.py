"""A look inside the forward: what the tap of a block and the probe of a model see, and that looking changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.autodiff.value_and_grad import value_and_grad
from minitune.lora import Lora
from minitune.models import Model, Probe, decoder
from minitune.models.block import block
from minitune.models.config import DecoderConfig, layer_kind
from minitune.models.weights import layer_of
from minitune.types import Batch, Mean, Params
from support.experts import small_experts
from support.families import sized
from support.models import family_of, random_batch, random_params, reference

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: sized("llama", attention_bias=True, mlp_bias=True),
    "phi3": lambda: sized("phi3"),  # fused projections
    "qwen2_moe": lambda: small_experts("qwen2_moe"),  # a plain mlp on the first layer, then experts and a shared one
}
Maps = dict[str, tuple[Tensor, Tensor]]  # name of a weight -> input and output of its linear map


def tapped(config: DecoderConfig, params: Params, tokens: Tensor, segment_ids: Tensor | None = None) -> Maps:
    """Everything that the taps of all blocks say, each map once."""
    x, inputs = decoder.before_first_block(config, params, tokens, segment_ids)
    maps: Maps = {}
    for i in range(config.n_layers):

        def tap(name: str, x: Tensor, y: Tensor, i: int = i) -> None:
            whole_name = f"model.layers.{i}.{name}"
            assert whole_name not in maps
            maps[whole_name] = x, y

        x = block(config, layer_kind(config, i).mixer, layer_of(params, i), x, inputs[layer_kind(config, i)], tap=tap)
    return maps


def hooked(config: DecoderConfig, params: dict[str, Tensor], tokens: Tensor) -> Maps:
    """Inputs and outputs of every nn.Linear within the layers of transformers' own model."""
    hf, maps = reference(config, params), {}

    def noted(name: str) -> Callable[..., None]:
        return lambda module, given, result: maps.update({f"{name}.weight": (given[0].detach(), result.detach())})

    for name, module in hf.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(noted(name))
    hf(tokens)
    return maps


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tap_sees_the_linear_maps_that_transformers_runs(name: str) -> None:
    config = CONFIGS[name]()
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    tapped_maps, wanted = tapped(config, params, tokens), hooked(config, params, tokens)
    linear = {key for key, w in params.items() if w.ndim == 2 and ".layers." in key}
    if config.experts is None:
        assert set(tapped_maps) == set(wanted) == linear
    else:
        assert set(wanted) < set(tapped_maps) == linear
    for key, pair in wanted.items():
        for ours, theirs in zip(tapped_maps[key], pair, strict=True):
            torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_tap_of_an_expert_sees_the_rows_that_go_to_it() -> None:
    config = small_experts("qwen2_moe")
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    tapped_maps, prefix = tapped(config, params, tokens), "model.layers.1.mlp"
    x, logits = (part.flatten(0, 1) for part in tapped_maps[f"{prefix}.gate.weight"])
    torch.testing.assert_close(logits, x @ params[f"{prefix}.gate.weight"].T)
    chosen = logits.softmax(-1).topk(config.experts.n_active).indices
    for e in range(config.experts.n_experts):
        gate, up, down = (f"{prefix}.experts.{e}.{part}_proj.weight" for part in ("gate", "up", "down"))
        rows = x[(chosen == e).any(1)]
        gated, raised = rows @ params[gate].T, rows @ params[up].T
        hidden = F.silu(gated) * raised
        for key, pair in {gate: (rows, gated), up: (rows, raised), down: (hidden, hidden @ params[down].T)}.items():
            torch.testing.assert_close(tapped_maps[key], pair)


def test_the_tap_sees_what_an_adapted_map_gives() -> None:
    config = CONFIGS["llama"]()
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    rule, key = Lora(2, 3.0, ("*.2.mlp.up_proj.weight",)), "model.layers.2.mlp.up_proj.weight"
    deltas = {name: delta._replace(b=torch.ones_like(delta.b)) for name, delta in rule.init(params, 0).items()}
    adapted, merged = (tapped(config, some, tokens)[key] for some in (rule.apply(params, deltas), rule.merge(params, deltas)))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)


WEIGHTS = ("self_attn.o_proj.weight", "mlp.gate.weight", "mlp.down_proj.weight")  # no layer has all of them


def probed(model: Model, params: Params, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Any]:
    """(outputs that the probe receives, hidden states, gradients of a sum of both) from one forward and backward."""
    received: dict[str, Tensor] = {}
    model = model._replace(probe=Probe(WEIGHTS, lambda name, y: received.update({name: y})))

    def objective(leaves: Params) -> tuple[Mean, Tensor]:
        received.clear()
        hidden = model.hidden(leaves, batch)
        total = hidden.square().sum() + sum(y.sin().sum() for y in received.values())
        return Mean(total, torch.ones(())), hidden

    (_, hidden), grads = value_and_grad(objective, has_aux=True)(params)
    return {name: y.detach() for name, y in received.items()}, hidden, grads


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_a_probe_receives_what_the_tap_sees_recomputed_or_not_and_gradients_flow_through_it(name: str) -> None:
    config = CONFIGS[name]()
    model, params = Model(family_of(config), config), random_params(config)
    tokens = random_batch(config, 2, 11).tokens
    batch = Batch(tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    received, hidden, grads = probed(model, params, batch)
    wanted = {key: y for key, (_, y) in tapped(config, params, *batch[:2]).items() if key.split(".", 3)[3] in WEIGHTS}
    assert list(received) == list(wanted)
    for key, y in wanted.items():
        torch.testing.assert_close(received[key], y, rtol=0, atol=0)
    torch.testing.assert_close(hidden, model.hidden(params, batch), rtol=0, atol=0)

    def plain(leaves: Params) -> Mean:
        maps = tapped(config, leaves, *batch[:2])
        outputs = sum(y.sin().sum() for key, (_, y) in maps.items() if key in wanted)
        return Mean(model.hidden(leaves, batch).square().sum() + outputs, torch.ones(()))

    for key, g in value_and_grad(plain)(params)[1].items():
        torch.testing.assert_close(grads[key], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()))
    for n_remat in (1, config.n_layers):
        again = probed(model._replace(n_remat=n_remat), params, batch)
        torch.testing.assert_close(again, (received, hidden, grads), rtol=0, atol=0)
