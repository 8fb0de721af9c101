"""8-bit floats: nearest codes, products of rounded rows against float64, what the card's kernel asks for, and where it is used.

Torch multiplies 8-bit floats on a CPU too, slowly: the products are checked here, and the kernel of a card where there is one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # a custom operator's first call imports it, which fails while aten._scaled_mm is replaced
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import checkpoint, hardware, models
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model, block
from minitune.models.families import llama
from minitune.quant import float8
from minitune.quant.linear import quantized_linear
from minitune.quant.rules import Quantization
from minitune.quant.schemes import Float8, dequantize, quantize
from minitune.quant.tensors import QFloat8
from minitune.types import Delta, Mean
from support.models import random_batch, random_params
from support.programs import LORA, TRAIN, evaluation, run
from support.quantized import CONFIG, TOKENS, dense, is_linear, logits_of_transformers, save_compressed

NUMBERS = torch.arange(256, dtype=torch.uint8).view(float8.E4M3).double()
NUMBERS = NUMBERS[NUMBERS.isfinite()].unique()
CARD = "needs a card that multiplies 8-bit floats (compute capability 8.9 or higher)"
HALF_STEP, SMALLEST = 2.0**-4, 2.0**-10  # of a number's size; of the numbers below 2^-6, half their distance


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(x: Tensor) -> Tensor:
    """The nearest of all numbers that eight bits can hold, in float64."""
    return NUMBERS[(x.double()[..., None] - NUMBERS).abs().argmin(-1)]


def leaf(d_out: int, d_in: int, seed: int = 0) -> QFloat8:
    q = quantize(normal(d_out, d_in, seed=seed, scale=0.3), Float8())
    assert isinstance(q, QFloat8)
    return q


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The results' shapes of all products, each held to what a card's kernel asks for: the first matrix by rows, the second by
    columns, sizes in pieces, scales in float32, a result in bfloat16."""
    kernel, shapes = torch.ops.aten._scaled_mm, []

    def checked(rows: Tensor, columns: Tensor, ours: Tensor, others: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert rows.dtype == columns.dtype == float8.E4M3
        assert (rows.stride(1), columns.stride(0)) == (1, 1)
        assert rows.shape[1] % 16 == columns.shape[1] % 16 == 0
        assert (ours.shape, others.shape) == ((len(rows), 1), (1, columns.shape[1]))
        assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in (ours, others))
        assert out_dtype == torch.bfloat16
        y = kernel(rows, columns, ours, others, out_dtype=out_dtype)
        shapes.append(y.shape)
        return y

    monkeypatch.setattr(torch.ops.aten, "_scaled_mm", checked)
    return shapes


@given(st.integers(1, 9), st.integers(1, 71), st.integers(0, 99), st.sampled_from([1.0, 0.02, 1e-30, 1e30]), st.booleans())
def test_codes_are_the_nearest(d_out: int, d_in: int, seed: int, size: float, outliers: bool):
    w = normal(d_out, d_in, seed=seed, scale=size) * (normal(d_out, d_in, seed=7).abs() ** 5 if outliers else 1.0)
    w = w * (normal(d_out, 1, seed=seed) < 1.5)  # some rows are zeros
    q = quantize(w, Float8())
    assert isinstance(q, QFloat8)
    scaled = w.double() / q.scale.double()
    wanted = (nearest(scaled) - scaled).abs()
    assert ((q.codes.double() - scaled).abs() <= wanted + 1e-7 * scaled.abs()).all()
    assert torch.equal(q.scale, q.scale.bfloat16().float())
    error = (dequantize(q, torch.float64) - w.double()).abs()
    assert (error <= HALF_STEP * w.abs() + SMALLEST * q.scale).all()


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1.0, 1e-30, 1e30, 0.0]))
def test_rows_are_rounded_to_the_nearest_with_their_largest_at_the_top(n: int, d_in: int, seed: int, size: float):
    x = normal(n, d_in, seed=seed, scale=size)
    codes, scale = float8.rounded(x)
    assert codes.double().isfinite().all()
    scaled = x.double() / scale.double()
    assert ((codes.double() - scaled).abs() <= (nearest(scaled) - scaled).abs() + 1e-6 * scaled.abs()).all()
    assert (codes.double().abs().amax(1) == (448.0 if size else 0.0)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float):
    x = normal(3, 32).bfloat16().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad).bfloat16())
    y = float8.product(x, *leaf(16, 32), False)
    assert y[[0, 2]].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize(("shape", "d_out"), [((7, 32), 48), ((3, 5, 64), 16), ((1, 1, 16), 80)])
def test_a_product_and_its_derivatives_are_those_of_rounded_rows(shape: tuple[int, ...], d_out: int, calls: list[torch.Size]):
    q, x = leaf(d_out, shape[-1]), normal(*shape, seed=1).bfloat16().requires_grad_()
    g = normal(*shape[:-1], d_out, seed=2).bfloat16().requires_grad_()
    codes, scale = q.codes.double(), q.scale.double()

    def rows(x: Tensor) -> Tensor:
        product, scales = float8.rounded(x)
        return product.double() * scales.double()

    y = float8.product(x, *q, False)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (dg,) = torch.autograd.grad(dx, g, x.detach())
    assert len(calls) == 3
    for product, left, right in (
        (y, rows(x.detach()), (codes * scale).T),
        (dx, rows(g.detach() * q.scale.T), codes),
        (dg, rows(x.detach()), (codes * scale).T),
    ):
        wanted, size = left @ right, left.abs() @ right.abs()
        assert ((product.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-5 * size).all()  # bfloat16 of a float32 sum
    for product, left, right in ((y, x, (codes * scale).T), (dx, g, codes * scale)):
        left = left.detach().double()
        peak = (left if right.shape[1] == d_out else left * scale.T).abs().amax(-1, keepdim=True)
        below = SMALLEST / 448 * peak * (right if right.shape[1] == d_out else codes).abs().sum(0)
        bound = (HALF_STEP + 2.0**-8) * (left.abs() @ right.abs()) + below
        assert ((product.double() - left @ right).abs() <= bound).all()


def test_products_are_used_on_cards_that_have_them_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode():
        for capability, dtype, shape, device, wanted in (
            ((9, 0), torch.bfloat16, (32, 48), "cuda", True),
            ((8, 9), torch.bfloat16, (32, 48), "cuda", True),
            ((8, 0), torch.bfloat16, (32, 48), "cuda", False),
            ((9, 0), torch.float32, (32, 48), "cuda", False),
            ((9, 0), torch.bfloat16, (32, 40), "cuda", False),
            ((9, 0), torch.bfloat16, (24, 48), "cuda", False),
            ((9, 0), torch.bfloat16, (32, 48), "cpu", False),
        ):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, answer=capability: answer)
            codes = torch.empty(shape, dtype=float8.E4M3, device=device)
            x = torch.empty(2, 5, shape[1], dtype=dtype, device=device)
            assert float8.takes(x, codes) is wanted
            assert not float8.takes(torch.empty(0, 5, shape[1], dtype=dtype, device=device), codes)


def on_cpu(x: Tensor, codes: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def test_a_lora_step_over_8_bit_floats(monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]):
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: True)  # as on a card: activations stay bfloat16
    config = llama.Config(n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_head=16, d_ff=96, vocab_size=17)
    params = {name: (0.1 * w).bfloat16() for name, w in random_params(config).items()}
    params = Quantization(Float8()).quantize(params)
    model, batch, rule = Model(llama.FAMILY, config), random_batch(config, 3, 17), Lora(2, 4.0, ("*_proj.weight",))
    deltas = rule.init(params, 0)
    deltas = {name: delta._replace(b=normal(*delta.b.shape, scale=0.1)) for name, delta in deltas.items()}

    def total(deltas: dict[str, Delta]) -> Mean:
        return Mean.of(model.token_losses(rule.apply(params, deltas), batch, CrossEntropy()), batch.target_mask())

    decoded, wanted = value_and_grad(total)(deltas)
    monkeypatch.setattr(float8, "takes", on_cpu)
    rounded, actual = value_and_grad(total)(deltas)
    assert len(calls) == 14 + 11  # nothing flows back into the first layer's q, k and v
    assert 0 < float((rounded.total - decoded.total).abs() / decoded.total) < 0.02
    first, second = (torch.cat([x.flatten() for delta in tree.values() for x in delta[:2]]) for tree in (actual, wanted))
    assert 1e-4 < float((first - second).norm() / second.norm()) < 0.15


@pytest.mark.skipif(not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= float8.CAPABILITY), reason=CARD)
def test_a_card_multiplies_as_the_cpu_does():
    q, x, g = leaf(256, 512), normal(2, 33, 512, seed=1).bfloat16(), normal(2, 33, 256, seed=2).bfloat16()

    def both(x: Tensor, q: QFloat8) -> tuple[Tensor, Tensor]:
        own = x.requires_grad_()
        y = quantized_linear(own, q)
        return y.detach().cpu(), torch.autograd.grad(y, own, g.to(y.device))[0].cpu()

    assert float8.takes(x.cuda(), q.codes.cuda())
    on_card = both(x.cuda(), QFloat8(*(leaf.cuda() for leaf in q)))
    own = x.clone().requires_grad_()
    y = float8.product(own, *q, False)
    torch.testing.assert_close(on_card, (y.detach(), torch.autograd.grad(y, own, g)[0]), rtol=2.0**-7, atol=1e-2)


def test_the_compressed_folder_is_read_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params = {n: quantize(w, Float8()) if is_linear(n) else w for n, w in random_params(CONFIG).items()}
    folder = save_compressed(tmp_path, params)
    asked = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    group = asked["config_groups"]["group_0"]
    assert (asked["format"], group["weights"]["type"], group["weights"]["strategy"]) == ("float-quantized", "float", "channel")
    assert (group["input_activations"]["type"], group["input_activations"]["dynamic"]) == ("float", True)
    saved = checkpoint.load_tensors(folder / "model.safetensors")
    for name, w in params.items():
        if isinstance(w, QFloat8):
            assert torch.equal(saved[name].view(torch.uint8), w.codes.view(torch.uint8))
            assert torch.equal(saved[f"{name}_scale"], w.scale)

    def linear(x: Tensor, w: Any, delta: None = None, bias: None = None) -> Tensor:
        if isinstance(w, QFloat8):
            codes, scale = float8.rounded(x)
            return (codes.float() * scale) @ dequantize(w, torch.float32).T
        return x @ dense(w).T

    monkeypatch.setattr(block, "linears", lambda x, weights, _: [linear(x, w) for w in weights])
    wanted = Model(llama.FAMILY, CONFIG).forward(params, TOKENS)
    torch.testing.assert_close(logits_of_transformers(folder, TOKENS), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


FLOAT8 = '[[stage]]\nop = "quantize"\nscheme = { kind = "float8" }\n'


def test_a_program_trains_over_8_bit_floats_and_writes_them(tiny: Path, tmp_path: Path):
    stages = FLOAT8 + LORA + TRAIN + evaluation("after") + '[[stage]]\nop = "save"\nwhat = "merged"\ndtype = "float32"\n'
    summary = run(tmp_path, tiny, stages)
    kept = checkpoint.load_tensors(next((tmp_path / "p/checkpoints").glob("*quantize*/quantized.safetensors")))
    base = models.open(tiny / "model")
    weights = checkpoint.load_params(tiny / "model", base.shapes(), torch.float32)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        q = quantize(weights[name], Float8())
        assert isinstance(q, QFloat8)
        assert torch.equal(kept[f"{name}.codes"].view(torch.uint8), q.codes.view(torch.uint8))
        assert torch.equal(kept[f"{name}.scale"], q.scale)
    again = run(tmp_path, tiny, evaluation("after"), f"model.path={tmp_path / 'p/merged'}", name="again")
    assert again["after"]["loss_nats"] == pytest.approx(summary["after"]["loss_nats"], rel=1e-5)
    for kind in ("compressed-tensors", "gguf"):
        run(tmp_path, tiny, FLOAT8 + f'[[stage]]\nop = "export"\nformat = "{kind}"\n', name=kind)


def test_bitsandbytes_holds_no_8_bit_floats(tmp_path: Path):
    from minitune.interop import bitsandbytes

    params = {n: quantize(w, Float8()) if is_linear(n) else w for n, w in random_params(CONFIG).items()}
    extras = checkpoint.FolderExtras(tmp_path, [3])
    with pytest.raises(InputError, match=r"q_proj.weight is float8, expected NF4; write it in the format"):
        bitsandbytes.save(tmp_path / "model", params, Model(llama.FAMILY, CONFIG), extras)
