"""Quantized weights: error bounds, the bytes of other libraries, and linear maps over codes."""

from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import msgspec
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from minitune import tree
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.nn import linear as nn_linear
from minitune.nn.linear import linear
from minitune.quant import nf4
from minitune.quant import schemes as quant_schemes
from minitune.quant.linear import DECODE_ROWS, quantized_linear
from minitune.quant.rules import Quantization
from minitune.quant.schemes import MXFP4, NF4, NVFP4, PIECE, Float8, Int4, Int8, Scheme, dequantize, fake, packed, quantize
from minitune.quant.tensors import QNF4, QFloat8, QInt4, QInt8
from minitune.types import Adapted, Delta, Mean
from support.models import SMALL, random_batch, random_params

SCHEMES: dict[str, Scheme] = {
    "int8": Int8(),
    "float8": Float8(),
    "int4": Int4(),
    "int4 of 64": Int4(64),
    "int4 of 128": Int4(128),
    "nf4": NF4(),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
schemes = st.sampled_from(list(SCHEMES.values()))


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@st.composite
def weights(draw: st.DrawFn, scheme: Scheme) -> Tensor:
    """Any weight that fits the scheme: odd sizes, outliers, rows of zeros, sizes from 1e-30 to 1e30."""
    d_out = draw(st.integers(1, 9))
    unit = {Int8: 1, Float8: 1, NF4: 2, MXFP4: 32, NVFP4: 16}.get(type(scheme)) or scheme.group
    w = normal(d_out, unit * draw(st.integers(1, 3 if unit > 2 else 71)), seed=draw(st.integers(0, 99)))
    w = w * draw(st.sampled_from([1.0, 0.02, 1e-30, 1e30])) * normal(*w.shape, seed=7).abs() ** draw(st.sampled_from([0, 1, 5]))
    return w * (normal(d_out, 1, seed=draw(st.integers(0, 3))) < draw(st.sampled_from([9.0, 0.0])))


# torch's forward mode compiles its own decompositions when it is first used
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


# What the codes say of a weight


@given(st.data(), st.sampled_from([Int8(), *(Int4(g) for g in (32, 64, 128))]))
def test_integer_codes_are_the_nearest(data: st.DataObject, scheme: Int8 | Int4):
    w = data.draw(weights(scheme))
    q = quantize(w, scheme)
    assert isinstance(q, QInt8 | QInt4)
    scale = q.scale.repeat_interleave(w.shape[1] // q.scale.shape[1], dim=1)
    low, high = (-127, 127) if isinstance(scheme, Int8) else (-8, 7)
    nearest = torch.minimum(torch.maximum(w, low * scale), high * scale)  # w itself where it is not clipped
    error = (dequantize(q, torch.float32) - nearest).abs()
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert torch.equal(scale, scale.bfloat16().float())
    assert (scale > 0).all()
    if isinstance(scheme, Int8):
        assert (dequantize(q, torch.float32) - w).abs().le(0.5 * scale * (1 + 1e-5)).all()  # nothing is clipped


@given(st.data(), st.sampled_from([32, 64, 128]))
def test_int4_scales_are_at_least_as_good_as_the_fixed_rule(data: st.DataObject, group: Any):
    w = data.draw(weights(Int4(group)))
    blocks = w.unflatten(1, (-1, group)).double()
    scale = (blocks.abs().amax(2, keepdim=True) / 7.5).bfloat16().double().clamp(min=1e-37)
    theirs = ((blocks / scale).round().clamp(-8, 7) * scale - blocks).square().sum(2)
    ours = (dequantize(quantize(w, Int4(group)), torch.float32).double() - w).unflatten(1, (-1, group)).square().sum(2)
    assert (ours <= theirs * (1 + 1e-4) + 1e-70).all()


@given(st.data())
def test_nf4_error_is_bounded_by_the_gaps_of_both_tables(data: st.DataObject):
    w = data.draw(weights(NF4()))
    assume(float(w.abs().max()) < 1e20)  # the squares and sums below stay finite
    q = quantize(w, NF4())
    assert isinstance(q, QNF4)
    blocks = F.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    peak = blocks.abs().amax(1)
    nested = q.nested_absmax.repeat_interleave(256)[: len(peak)]
    gap = max(b - a for a, b in zip(nf4.TABLE, nf4.TABLE[1:], strict=False)) / 2
    # |table[c] * (peak + e) - w| <= gap * peak + |e|, where e <= half the widest step of the 8-bit map, and float32 rounding
    bound = gap * peak + (0.0071 + 1.6e-5) * nested + 1e-6 * (peak + q.offset.abs())
    error = F.pad((dequantize(q, torch.float32) - w).flatten(), (0, -w.numel() % 64)).view(-1, 64).abs().amax(1)
    assert (error <= bound).all()


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_part_of_an_nf4_weight_stands_for_its_part_of_the_numbers(n_rows: int, n_groups: int, data: st.DataObject):
    w = normal(31 * n_rows, 64 * n_groups)  # so that 256 maxima end within rows, and within parts
    q, dim = quantize(w, NF4()), data.draw(st.sampled_from([0, 1]))
    assert isinstance(q, QNF4)
    n = q.absmax.shape[dim]
    start = data.draw(st.integers(0, n - 1))
    length = data.draw(st.integers(1, n - start))
    numbers, n_bytes = (1, 64)[dim], (1, 32)[dim]  # of a unit of the maxima
    codes = q.codes.narrow(dim, start * n_bytes, length * n_bytes)
    some = q._replace(codes=codes, absmax=q.absmax.narrow(dim, start, length))
    own = nf4.part(some, dim, start * numbers, w.shape[dim])
    wanted = dequantize(q, torch.float32).narrow(dim, start * numbers, length * numbers)
    assert torch.equal(dequantize(own, torch.float32), wanted)


@given(st.data(), st.sampled_from([Int8(), *(Int4(g) for g in (32, 64, 128))]))
def test_what_is_on_the_grid_stays(data: st.DataObject, scheme: Scheme):
    once = dequantize(quantize(data.draw(weights(scheme)), scheme), torch.float32)
    assert torch.equal(dequantize(quantize(once, scheme), torch.float32), once)


@pytest.mark.parametrize("name", ["int8", "float8", "int4", "int4 of 64", "int4 of 128"])
def test_codes_of_a_dequantized_weight_are_the_same_codes(name: str):
    q = quantize(normal(37, 256), SCHEMES[name])
    assert all(map(torch.equal, quantize(dequantize(q, torch.float32), SCHEMES[name]), q))


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 1e-30), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", ["int8", "float8", "int4"])
def test_a_file_can_hold_the_scale_in_16_bits(name: str, dtype: torch.dtype, smallest: float):
    q = quantize(normal(37, 256, scale=smallest), SCHEMES[name])
    assert isinstance(q, QInt8 | QFloat8 | QInt4)
    assert torch.equal(q.scale.to(dtype).float(), q.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_dequantize_rounds_once(name: str, dtype: torch.dtype):
    q = quantize(normal(37, 256), SCHEMES[name])
    assert torch.equal(dequantize(q, dtype), dequantize(q, torch.float32).to(dtype))
    assert q.shape == (37, 256)


@pytest.mark.parametrize("shape", [(1031, 640), (3, 262144), (277777, 2)])
@pytest.mark.parametrize("name", ["int8", "int4 of 128", "nf4"])
def test_a_weight_of_several_pieces_equals_one_in_one_piece(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    if shape[1] == 2 and name == "int4 of 128":
        shape = (4097, 128)
    assert shape[0] * shape[1] > PIECE
    q = quantize(normal(*shape), SCHEMES[name])
    pieced = dequantize(q, torch.float32)
    monkeypatch.setattr(quant_schemes, "PIECE", 2**40)
    assert torch.equal(pieced, dequantize(q, torch.float32))


# Other libraries' bytes


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 22), (5, 64), (130, 66), (64, 64), (257, 770), (1024, 1024)])
def test_nf4_is_byte_equal_to_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, scale: float):
    w = normal(*shape, scale=min(scale, 1e4) if dtype == torch.float16 else scale, dtype=dtype)
    w = torch.where(normal(shape[0], 1, seed=1) > -1.5, w, 0.0)  # some rows of zeros
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    q = quantize(w, NF4())
    assert isinstance(q, QNF4)
    assert torch.equal(q.codes.flatten(), codes.flatten())
    assert torch.equal(q.absmax.flatten(), state.absmax)
    assert torch.equal(q.nested_absmax, state.state2.absmax)
    assert torch.equal(q.offset, state.offset)
    assert torch.equal(dequantize(q, dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(1, 62), (3, 64), (7, 50)])
def test_nf4_is_byte_equal_to_bitsandbytes_halfway_between_codes(shape: tuple[int, int]):
    """The last partial block is divided by its maximum, the others are multiplied by its inverse: here the last bit decides."""
    table = torch.tensor(nf4.TABLE)
    midpoints = (table[1:] + table[:-1]) / 2
    for seed in range(40):
        peak = float(normal(1, seed=seed).abs() + 0.1)
        w = (peak * torch.cat([torch.ones(1), midpoints]).repeat(24))[: shape[0] * shape[1]].view(shape)
        codes, _ = bnb.quantize_4bit(w.flatten(), blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(quantize(w, NF4()).codes.flatten(), codes.flatten())


def test_the_tables_are_those_of_bitsandbytes():
    state = bnb.quantize_4bit(normal(4, 64), compress_statistics=True, quant_type="nf4")[1]
    assert torch.equal(torch.tensor(nf4.TABLE), state.code)
    assert torch.equal(nf4.DYNAMIC_MAP, state.state2.code)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_bytes_are_those_of_compressed_tensors(group: Any):
    q = quantize(normal(37, 384), Int4(group))
    values = (dequantize(q, torch.float32).unflatten(1, (-1, group)) / q.scale[..., None]).flatten(1).round().to(torch.int8)
    assert set(values.flatten().tolist()) == set(range(-8, 8))
    assert torch.equal(q.codes.view(torch.int32), pack_to_int32(values, 4))


# Linear maps


@FORWARD_MODE
@pytest.mark.parametrize("name", SCHEMES)
def test_linear_and_its_derivatives_equal_those_of_the_dequantized_weight(name: str):
    q = quantize(normal(37, 256, seed=1, scale=0.1), SCHEMES[name])
    w = dequantize(q, torch.float64)
    x, tangent = normal(3, 5, 256, dtype=torch.float64), normal(3, 5, 256, seed=2, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return quantized_linear(x, q).tanh().square().sum()

    def theirs(x: Tensor) -> Tensor:
        return F.linear(x, w).tanh().square().sum()

    def twice(f: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return torch.autograd.grad((grad * tangent).sum(), leaf)[0]

    transforms: list[Callable[[Callable[[Tensor], Tensor]], Tensor]] = [
        lambda f: f(x),
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.vmap(torch.func.grad(f))(x),
        lambda f: torch.func.grad(lambda x: torch.func.vmap(torch.func.grad(f))(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.jvp(torch.func.grad(f), (x,), (tangent,))[1],
        lambda f: value_and_grad(lambda x: Mean(remat(f)(x), x.new_tensor(1.0)))(x)[1],
        twice,
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-11, atol=1e-11)


class WholeWeights(TorchDispatchMode):
    """Counts how many tensors of a weight's shape are alive at once, and the numbers in all tensors made."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.alive, self.most_whole, self.most_numbers = shapes, {}, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() > 1:  # no codes
                whole = x.shape in self.shapes
                storage = x.untyped_storage()
                before = self.alive.get(storage._cdata, (None, 0, False))
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // x.element_size(), whole or before[2])
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most_whole = max(self.most_whole, sum(whole for _, _, whole in self.alive.values()))
        self.most_numbers = max(self.most_numbers, sum(n for _, n, _ in self.alive.values()))
        return out


@pytest.mark.parametrize("name", ["int8", "float8", "int4", "nf4"])
def test_one_weight_at_a_time_is_whole(name: str, monkeypatch: pytest.MonkeyPatch):
    config = llama.Config(n_layers=2, n_heads=4, n_kv_heads=2, d_model=128, d_head=32, d_ff=160, vocab_size=17)
    dense = {name: 0.1 * w for name, w in random_params(config).items()}
    params = Quantization(SCHEMES[name]).quantize(dense)
    model, batch, rule = Model(llama.FAMILY, config), random_batch(config, 1, 11), Lora(2, 4.0, ("*_proj.weight",))
    deltas = rule.init(dense, 0)
    shapes = {w.shape for name, w in dense.items() if name.endswith("_proj.weight")}
    largest = max(shape.numel() for shape in shapes)

    def peak() -> tuple[int, int]:
        def total(deltas: dict[str, Delta]) -> Mean:
            return Mean.of(model.token_losses(rule.apply(params, deltas), batch, CrossEntropy()), batch.target_mask())

        with WholeWeights(shapes) as counted:
            value_and_grad(total)(deltas)
        return counted.most_whole, counted.most_numbers

    activations = 12 * 11 * (3 * 128 + 3 * 160) + 17 * 128 + sum(x.numel() for x in tree.leaves(deltas)) * 3
    whole, numbers = peak()
    assert whole == 1
    assert numbers <= 3 * largest + activations < 14 * largest
    monkeypatch.setattr(nn_linear, "quantized_linear", lambda x, q: F.linear(x, dequantize(q, x.dtype)))
    assert peak()[0] == 11  # of a linear whose graph keeps its weight: all but the first q, k, v, whose input needs no gradient


# Straight-through rounding


@FORWARD_MODE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_fake_is_the_quantized_weight_with_the_gradient_of_the_identity(name: str, dtype: torch.dtype):
    w, cotangent = normal(37, 256, dtype=dtype), normal(37, 256, seed=1, dtype=dtype)
    leaf = w.clone().requires_grad_()
    rounded = fake(leaf, SCHEMES[name])
    assert torch.equal(rounded, dequantize(quantize(w, SCHEMES[name]), dtype))
    assert not torch.equal(rounded, w)
    assert torch.equal(torch.autograd.grad(rounded, leaf, cotangent)[0], cotangent)
    assert torch.equal(torch.func.grad(lambda w: (fake(w, SCHEMES[name]) * cotangent).sum())(w), cotangent)
    tangent = torch.func.jvp(lambda w: fake(w, SCHEMES[name]), (w,), (cotangent,))[1]
    assert torch.equal(tangent, cotangent)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_fake_under_vmap(name: str):
    w = normal(3, 5, 64)
    each = torch.stack([fake(one, SCHEMES[name]) for one in w])
    assert torch.equal(torch.func.vmap(lambda w: fake(w, SCHEMES[name]))(w), each)


def test_training_through_fake_ends_in_the_very_weights_that_are_stored():
    trainable = {**random_params(WIDE), "model.norm.weight": torch.ones(64), "x": Delta(torch.ones(1, 3), torch.ones(2, 1))}
    rule = Quantization(Int4(), exceptions={"*.o_proj.weight": None, "*.mlp.*": NF4()})
    faked, stored = rule.fake(trainable), rule.quantize({n: w for n, w in trainable.items() if isinstance(w, Tensor)})
    for name, leaf in faked.items():
        if isinstance(stored.get(name, torch.empty(0)), Tensor):
            assert leaf is trainable[name]
        else:
            assert torch.equal(leaf, dequantize(stored[name], torch.float32))
    assert sum(leaf is not trainable[name] for name, leaf in faked.items()) == 2 * 6


# Rules


WIDE = msgspec.structs.replace(SMALL, d_model=64, d_ff=96, d_head=16)


def test_a_rule_chooses_by_glob():
    params = random_params(WIDE)
    rule = Quantization(Int4(), ("*_proj.weight", "lm_head.weight"), {"*.1.*": None, "*.mlp.*": NF4(), "lm*": Int8()})
    plan = rule.plan({name: w.to("meta") for name, w in params.items()})
    wanted = {f"model.layers.0.self_attn.{x}_proj.weight": Int4() for x in "qkvo"}
    wanted |= {f"model.layers.0.mlp.{x}_proj.weight": NF4() for x in ("gate", "up", "down")} | {"lm_head.weight": Int8()}
    assert plan == wanted
    assert rule.names(params) == list(plan)
    quantized = rule.quantize(params)
    assert list(quantized) == list(params)
    for name, leaf in quantized.items():
        if name not in plan:
            assert leaf is params[name]
        else:
            assert all(map(torch.equal, leaf, quantize(params[name], plan[name])))
    assert tree.n_bytes(quantized) < tree.n_bytes(params)


def test_rules_in_toml():
    text = 'scheme = {kind = "int4", group = 64}\nexceptions = {"lm_head.weight" = {kind = "int8"}, "*.k_*" = {kind = "nf4"}}'
    rule = msgspec.toml.decode(text, type=Quantization)
    assert rule == Quantization(Int4(64), exceptions={"lm_head.weight": Int8(), "*.k_*": NF4()})
    with pytest.raises(msgspec.ValidationError, match="48"):
        msgspec.toml.decode('scheme = {kind = "int4", group = 48}', type=Quantization)
    with pytest.raises(msgspec.ValidationError, match="groups"):
        msgspec.toml.decode('scheme = {kind = "int4", groups = 64}', type=Quantization)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Quantization(Int8(), ("*_prj.weight",)),
            r"quant: weights: '\*_prj.weight' matches no weight; the nearest are .*_proj",
        ),
        (Quantization(Int8(), exceptions={"*.norm.*": None}), r"quant: exceptions: '\*.norm.\*' matches no weight"),
        (
            Quantization(Int8(), ("*",)),
            r"model.embed_tokens.weight \[17, 64\] is not a linear weight, expected \[out, in\]",
        ),
        (Quantization(Int8(), ("*norm.weight",)), r"input_layernorm.weight \[64\] is not a linear weight.*; narrow the weights"),
        (Quantization(Int4(64)), r"down_proj.weight has shape \[64, 96\], .* multiple of the group 64; choose another group"),
    ],
)
def test_what_a_rule_refuses(rule: Quantization, message: str):
    params = random_params(WIDE)
    for act in (rule.plan, rule.names, rule.quantize):
        with pytest.raises(InputError, match=message):
            act(params)


def test_a_tied_head_is_refused():
    params = random_params(msgspec.structs.replace(WIDE, tie_embeddings=True))
    with pytest.raises(InputError, match=r"'lm_head\.weight' matches no weight"):
        Quantization(Int8(), ("lm_head.weight",)).plan(params)


def test_a_weight_is_quantized_once():
    once = Quantization(Int8()).quantize(random_params(WIDE))
    with pytest.raises(InputError, match=r"q_proj.weight is a QInt8 already, expected a plain weight; narrow the weights"):
        Quantization(Int8()).quantize(once)


def test_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"quant: a weight has shape \[3, 48\], expected .* the group 32; choose another group"):
        quantize(normal(3, 48), Int4())
    with pytest.raises(InputError, match=r"quant: a weight has shape \[4, 7\], expected .* a multiple of 2 for nf4, .*int8"):
        quantize(normal(4, 7), NF4())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float):
    params = random_params(WIDE)
    name = "model.layers.1.mlp.up_proj.weight"
    w = torch.where(torch.arange(64) == 3, bad, params[name])
    with pytest.raises(InputError, match=f"quant: {name} holds values that are not finite, expected numbers; has the training"):
        Quantization(Int8()).quantize({**params, name: w})


# Decoding


@pytest.mark.parametrize("n_rows", [1, 3, DECODE_ROWS, DECODE_ROWS + 1])
@pytest.mark.parametrize("name", ["int8", "int4", "int4 of 64", "int4 of 128"])
def test_few_rows_go_through_packed_kernels(name: str, n_rows: int):
    q = quantize(normal(48, 256, scale=0.1), SCHEMES[name])
    leaf = packed({"w": q})["w"]
    x = normal(1, n_rows, 256, dtype=torch.bfloat16)
    exact = F.linear(x.double(), dequantize(q, torch.float64))
    rounding = F.linear(x.abs().double(), dequantize(q, torch.float64).abs()) * 2**-8
    with torch.no_grad():
        y = quantized_linear(x, leaf)
    assert y.shape == (1, n_rows, 48)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= rounding).all()


class Called(TorchDispatchMode):
    """Notes the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "kernel"), [("int8", "_weight_int8pack_mm"), ("int4", "_weight_int4pack_mm_for_cpu")])
def test_when_the_packed_kernels_are_taken(name: str, kernel: str):
    leaf = packed({"w": quantize(normal(48, 256), SCHEMES[name])})["w"]

    def takes(x: Tensor) -> bool:
        with Called() as called:
            quantized_linear(x, leaf)
        return kernel in called.names

    few = normal(DECODE_ROWS, 256, dtype=torch.bfloat16)
    assert takes(few)
    assert takes(few.float())
    assert not takes(few.double())
    assert not takes(normal(DECODE_ROWS + 1, 256, dtype=torch.bfloat16))
    assert not takes(few.clone().requires_grad_())
    with torch.no_grad():
        assert takes(few.clone().requires_grad_())


def test_a_packed_leaf_differentiates_and_dequantizes_as_its_codes():
    q = quantize(normal(48, 256), Int4())
    leaf, x = packed({"w": q})["w"], normal(3, 256, dtype=torch.bfloat16)
    assert leaf.shape == q.shape
    assert torch.equal(dequantize(leaf, torch.float32), dequantize(q, torch.float32))
    grads = [torch.func.grad(lambda x, w=w: quantized_linear(x, w).square().sum())(x) for w in (leaf, q)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_few_rows_under_vmap_are_decoded(name: str):
    leaf = packed({"w": quantize(normal(48, 256), SCHEMES[name])})["w"]
    x = normal(2, 3, 256, dtype=torch.bfloat16)
    wanted = F.linear(x, dequantize(leaf, torch.bfloat16))
    torch.testing.assert_close(torch.func.vmap(lambda x: quantized_linear(x, leaf))(x), wanted)


@settings(max_examples=20)
@given(n_in=st.integers(1, 70), start=st.integers(0, 33), n_rows=st.integers(1, 8))
def test_codes_are_decoded_wherever_they_lie(n_in: int, start: int, n_rows: int):
    """Files have tensors at any address, at some of which torch's kernel for AVX512 ended the process."""
    q = quantize(normal(48, n_in, scale=0.1), Int8())
    memory = torch.empty(start + q.codes.numel(), dtype=torch.int8)
    memory[start:] = q.codes.flatten()
    placed = q._replace(codes=memory[start:].view(48, n_in))
    x = normal(n_rows, n_in, dtype=torch.bfloat16)
    with torch.no_grad():
        y = quantized_linear(x, packed({"w": placed})["w"])
    torch.testing.assert_close(y, F.linear(x, dequantize(q, torch.bfloat16)), rtol=2e-2, atol=2e-2)


def test_what_has_no_kernel_is_not_packed():
    params = {"w": normal(48, 64), "nf4": quantize(normal(48, 64), NF4()), "odd": quantize(normal(40, 64), Int4())}
    assert all(leaf is params[name] for name, leaf in packed(params).items())


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_a_model_over_codes_is_the_model_over_their_weights(name: str):
    params = Quantization(SCHEMES[name]).quantize(random_params(WIDE))
    dense = {n: w if isinstance(w, Tensor) else dequantize(w, torch.float32) for n, w in params.items()}
    tokens = random_batch(WIDE, 2, 9).tokens
    model = Model(llama.FAMILY, WIDE)
    torch.testing.assert_close(model.forward(params, tokens), model.forward(dense, tokens), rtol=0, atol=1e-6)
    assert not torch.allclose(model.forward(params, tokens), model.forward(random_params(WIDE), tokens), atol=1e-3)


def test_ops_linear_takes_codes_with_a_delta():
    q = quantize(normal(37, 64), Int8())
    x, delta = normal(3, 64), Delta(normal(2, 64), normal(37, 2), normal(37).abs())
    torch.testing.assert_close(linear(x, Adapted(q, *delta)), linear(x, Adapted(dequantize(q, torch.float32), *delta)))
