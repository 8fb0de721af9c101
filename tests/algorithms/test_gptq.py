"""GPTQ against the paper's own formulation, against rounding to nearest, and through whole models."""

from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitune import seeds
from minitune.algorithms import gptq as algorithms_gptq
from minitune.algorithms.gptq import Gptq, Method, Rtn, gptq, gptq_weight
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.families import llama
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Float8, Int4, Int8, dequantize, quantize
from minitune.types import Batch, Delta, Params
from support.models import SMALL, random_batch, random_params

WIDE = msgspec.structs.replace(SMALL, d_model=64, d_ff=96, d_head=16)
MODEL = Model(llama.FAMILY, WIDE)
INTEGERS: list[Any] = [Int8(), Int4(32), Int4(64), Int4(128)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed, *map(str, shape)))


def correlated(n: int, d: int, seed: int = 0) -> Tensor:
    """Inputs most of whose variance lies in a few directions, as hidden states have it."""
    return normal(n, 7, seed=seed) @ normal(7, d, seed=seed + 1) + 0.3 * normal(n, d, seed=seed + 2)


def by_elimination(w: Tensor, gram: Tensor, scheme: Int8 | Int4, damp: float) -> Tensor:
    """The levels of GPTQ by its equations 2 and 3: after each column the inverse Hessian of the columns that are left."""
    w, h = w.double(), gram.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    group = scheme.group_size(w.shape[1])
    levels = []
    for j in range(w.shape[1]):
        if j % group == 0:
            scale = scheme.scale(w[:, j : j + group].float()).double()
        level = scheme.levels(w[:, j : j + 1], scale)
        inverse = torch.linalg.inv(h[j:, j:])
        change = (w[:, j : j + 1] - level * scale) / inverse[0, 0] * inverse[:1]
        w = torch.cat([w[:, :j], w[:, j:] - change], dim=1)
        levels.append(level)
    return torch.cat(levels, dim=1)


def levels_of(q: Any, scheme: Int8 | Int4) -> Tensor:
    scale = q.scale.repeat_interleave(scheme.group_size(q.shape[1]), dim=1)
    return (dequantize(q, torch.float64) / scale).round()


@pytest.mark.parametrize("damp", [0.01, 1.0])
@pytest.mark.parametrize(("scheme", "d_in"), [(Int8(), 151), (Int8(), 7), (Int4(32), 160), (Int4(64), 192), (Int4(128), 256)])
def test_equals_the_papers_equations_without_their_shortcuts(scheme: Int8 | Int4, d_in: int, damp: float):
    w, x = normal(11, d_in), correlated(3 * d_in, d_in)
    levels = levels_of(gptq_weight(w, x.T @ x, scheme, damp), scheme)
    assert torch.equal(levels, by_elimination(w, x.T @ x, scheme, damp))
    assert not torch.equal(levels, levels_of(quantize(w, scheme), scheme))


@pytest.mark.parametrize("gram", [torch.eye(256), 3.7 * torch.eye(256), torch.zeros(256, 256), torch.diag(normal(256).square())])
@pytest.mark.parametrize("scheme", INTEGERS)
def test_is_rounding_to_nearest_for_uncorrelated_inputs(scheme: Int8 | Int4, gram: Tensor):
    w = normal(13, 256)
    assert all(map(torch.equal, gptq_weight(w, gram, scheme, 0.01), quantize(w, scheme)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", INTEGERS)
def test_changes_outputs_less_than_rounding_to_nearest(scheme: Int8 | Int4, seed: int):
    w, x = normal(29, 256, seed=seed), correlated(400, 256, seed=seed)
    fresh = normal(400, 7, seed=seed + 9) @ normal(7, 256, seed=seed + 1) + 0.3 * normal(400, 256, seed=seed + 10)

    def error(q: Any, x: Tensor) -> float:
        return float((x @ (w - dequantize(q, torch.float32)).T).square().sum())

    ours, theirs = gptq_weight(w, x.T @ x, scheme, 0.01), quantize(w, scheme)
    assert error(ours, x) < 0.6 * error(theirs, x)
    assert error(ours, fresh) < 0.8 * error(theirs, fresh)  # inputs of the same kind that were not seen


@pytest.mark.parametrize("scheme", [Int8(), Int4(32)])
def test_columns_that_were_never_used_are_rounded_to_nearest(scheme: Int8 | Int4):
    w, x = normal(13, 128), correlated(300, 128)
    x = torch.where(torch.arange(128) >= 96, 0.0, x)
    scale = quantize(w, scheme).scale
    levels = levels_of(gptq_weight(w, x.T @ x, scheme, 0.01), scheme)[:, 96:]
    assert torch.equal(levels, scheme.levels(w[:, 96:], scale[:, -1:]).double())


def inputs_by_hand(params: Params, batches: list[Batch], name: str, layer: int) -> Tensor:
    """The real tokens' inputs of q_proj or gate_proj of a layer, from a model cut off below it."""
    cut = Model(llama.FAMILY, msgspec.structs.replace(WIDE, n_layers=layer + (name == "mlp.gate_proj")))
    params = {**params, "model.norm.weight": params[f"model.layers.{layer}.input_layernorm.weight"]}
    if name == "mlp.gate_proj":  # a block without its second half
        zero = torch.zeros_like(normal(64, 96))
        norm = params[f"model.layers.{layer}.post_attention_layernorm.weight"]
        params = {**params, f"model.layers.{layer}.mlp.down_proj.weight": zero, "model.norm.weight": norm}
    return torch.cat([cut.hidden(params, batch)[batch.segment_ids > 0] for batch in batches])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj"])
def test_a_layer_is_calibrated_on_what_the_quantized_layers_before_it_give(name: str, layer: int):
    params, rule = random_params(WIDE), Quantization(Int4(), exceptions={"*.down_proj.weight": Int8()})
    batches = [random_batch(WIDE, 3, 17, seed=0), random_batch(WIDE, 2, 13, seed=1)]
    assert any((batch.segment_ids == 0).any() for batch in batches)
    quantized = gptq(MODEL, params, batches, rule, damp=0.02)
    below = {n: (quantized if f"layers.{layer}." not in n else params)[n] for n in params}
    x = inputs_by_hand(below, batches, name, layer)
    full = f"model.layers.{layer}.{name}.weight"
    wanted = gptq_weight(params[full], x.T @ x, Int4(), 0.02)
    assert levels_of(quantized[full], Int4()).ne(levels_of(wanted, Int4())).double().mean() < 0.002  # sums in another order
    if layer == 1:  # and not on what the dense ones give
        x = inputs_by_hand(params, batches, name, layer)
        dense = gptq_weight(params[full], x.T @ x, Int4(), 0.02)
        assert levels_of(quantized[full], Int4()).ne(levels_of(dense, Int4())).double().mean() > 0.05


def test_padding_is_not_calibrated_on():
    params, rule, batch = random_params(WIDE), Quantization(Int4()), random_batch(WIDE, 3, 17)
    other = torch.where(batch.segment_ids > 0, batch.tokens, (batch.tokens + 5) % WIDE.vocab_size)
    assert not torch.equal(other, batch.tokens)
    ours, theirs = (gptq(MODEL, params, [b], rule, damp=0.01) for b in (batch, batch._replace(tokens=other)))
    assert all(torch.equal(x, y) for name in rule.names(params) for x, y in zip(ours[name], theirs[name], strict=True))


def test_only_what_is_planned_changes_and_the_head_can_be():
    params = random_params(WIDE)
    rule = Quantization(Int4(), ("*_proj.weight", "lm_head.weight"), {"*.0.mlp.*": None, "lm_head.weight": Int8()})
    batch = random_batch(WIDE, 3, 17)
    quantized = gptq(MODEL, params, [batch], rule, damp=0.01)
    plan = rule.plan(params)
    assert list(quantized) == list(params)
    assert all(leaf is params[name] for name, leaf in quantized.items() if name not in plan)
    assert all(type(quantized[name]) is type(quantize(params[name], scheme)) for name, scheme in plan.items())
    x = MODEL.hidden(quantized, batch)[batch.segment_ids > 0]
    wanted = gptq_weight(params["lm_head.weight"], x.T @ x, Int8(), 0.01)
    assert all(map(torch.equal, quantized["lm_head.weight"], wanted))


def test_deltas_are_part_of_what_is_calibrated_on():
    params, rule, batch = random_params(WIDE), Quantization(Int4()), random_batch(WIDE, 3, 17)
    up = "model.layers.0.mlp.up_proj.weight"
    deltas, lora = {up: Delta(normal(2, 64), normal(96, 2))}, Lora(rank=2, alpha=2.0, targets=(up,))
    merged = {**params, up: params[up] + deltas[up].b @ deltas[up].a}
    name = "model.layers.0.mlp.down_proj.weight"
    adapted = gptq(MODEL, lora.apply(params, deltas), [batch], rule, damp=0.01)
    with_deltas, merged_in = adapted[name], gptq(MODEL, merged, [batch], rule, damp=0.01)[name]
    without = gptq(MODEL, params, [batch], rule, damp=0.01)[name]
    assert all(torch.equal(x, y) for x, y in zip(adapted[up][1:3], deltas[up][:2], strict=True))
    assert levels_of(adapted[up].w, Int4()).eq(levels_of(gptq(MODEL, params, [batch], rule, damp=0.01)[up], Int4())).all()
    assert levels_of(with_deltas, Int4()).ne(levels_of(merged_in, Int4())).double().mean() < 0.002
    assert levels_of(with_deltas, Int4()).ne(levels_of(without, Int4())).double().mean() > 0.05


def test_a_bfloat16_model_with_float32_linears_is_calibrated():
    params = {n: w if n.endswith("_proj.weight") else w.bfloat16() for n, w in random_params(WIDE).items()}
    quantized = gptq(MODEL, params, [random_batch(WIDE, 3, 17)], Quantization(Int8()), damp=0.01)
    assert not any(isinstance(quantized[name], Tensor) for name in Quantization(Int8()).names(params))


@pytest.mark.parametrize("scheme", [Int8(), Int4()])
def test_a_model_loses_less_than_by_rounding_to_nearest(scheme: Int8 | Int4):
    params, rule = {n: 0.3 * w if w.ndim == 2 else w for n, w in random_params(WIDE).items()}, Quantization(scheme)
    batches = [random_batch(WIDE, 8, 33, seed=seed) for seed in range(3)]
    held_out = random_batch(WIDE, 8, 33, seed=9)

    def divergence(quantized: Params) -> float:
        logps, wanted = (F.log_softmax(MODEL.forward(p, held_out.tokens), -1) for p in (quantized, params))
        return float((wanted.exp() * (wanted - logps)).sum(-1).mean())

    assert divergence(gptq(MODEL, params, batches, rule, damp=0.01)) < 0.9 * divergence(rule.quantize(params))


def test_what_can_not_be_calibrated_is_refused():
    params, batch = random_params(WIDE), random_batch(WIDE, 1, 9)
    with pytest.raises(InputError, match=r"gptq: model.layers.0.*q_proj.weight is to be nf4, expected int8 or int4 .* rtn"):
        gptq(MODEL, params, [batch], Quantization(NF4()), damp=0.01)
    with pytest.raises(InputError, match=r"q_proj.weight is to be float8, expected int8 or int4 for gptq; choose the method rtn"):
        gptq(MODEL, params, [batch], Quantization(Float8()), damp=0.01)
    with pytest.raises(InputError, match="gptq: no row of data to calibrate on, expected at least one; look at the data"):
        gptq(MODEL, params, [], Quantization(Int8()), damp=0.01)
    with pytest.raises(InputError, match=r"gptq: spare_proj.weight is used by no linear map of a block, .* except it"):
        gptq(MODEL, {**params, "spare_proj.weight": normal(3, 4)}, [batch], Quantization(Int8()), damp=0.01)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"quant: {name} holds values that are not finite"):
        gptq(MODEL, {**params, name: params[name] / 0}, [batch], Quantization(Int8()), damp=0.01)


def test_methods_in_toml():
    assert msgspec.toml.decode('kind = "rtn"', type=Method) == Rtn()
    assert msgspec.toml.decode('kind = "gptq"\ndata = "train"\nrows = 3', type=Method) == Gptq("train", 3, 0.01)
    for wrong in ("rows = 0", "rows = 3\ndamp = 0.0"):
        with pytest.raises(msgspec.ValidationError, match=r"Expected `(int|float)` >=? ?[01]"):
            msgspec.toml.decode(f'kind = "gptq"\ndata = "train"\n{wrong}', type=Method)


def test_every_group_ends_where_a_block_of_columns_ends():
    assert all(algorithms_gptq.BLOCK % group == 0 for group in (32, 64, 128))
