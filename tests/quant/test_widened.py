"""bfloat16 on a processor that does not multiply it: right to float32, with the memory of 16 bits, and nothing is emulated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minitune import hardware, tree
from minitune.__main__ import main
from minitune.algorithms.objective import apply_trainable, split_trainable
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.inference.generate import greedy
from minitune.lora import Lora
from minitune.models import Model, decoder
from minitune.models.experts import Experts
from minitune.models.families import llama, mixtral
from minitune.nn.linear import linear
from minitune.planning.activations import kept_bytes
from minitune.quant import widened
from minitune.quant.schemes import NF4, Float8, Int4, Int8, Scheme, dequantize, packed, quantize
from minitune.types import Batch
from support.models import SMALL, random_params, reference
from support.programs import toy

# torch.mv is not among them: its kernel for bfloat16 adds up in float32 on any processor
EMULATED = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_dot_product_flash_attention_for_cpu")
MODEL = Model(llama.FAMILY, SMALL)
# torch scripts rules of its own when forward mode is first used
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bfloat16 products, whatever this one is."""
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that cut the small weights of these tests in several pieces."""
    monkeypatch.setattr(widened, "BLOCK", 2**9)
    monkeypatch.setattr(widened, "COLUMNS", 8)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def bfloat16_products(products: list[str]) -> Iterator[None]:
    """Collect the names of the matrix products that torch runs on bfloat16, those inside of operators and backwards too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        yield
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    for event in profiled.profiler.kineto_results.events():
        name = event.name().removeprefix("aten::")
        if name in EMULATED and "c10::BFloat16" in event.dtypes():
            products.append(name)


def half(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.bfloat16() for name, w in params.items()}


def batch_of(vocab_size: int) -> Batch:
    tokens = torch.randint(0, vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))


@FORWARD_MODE
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("rows", [(3, 7), (1,), (90,)])
def test_a_product_and_its_derivatives_equal_those_of_the_wide_weight(rows: tuple[int, ...], layout: str) -> None:
    w = normal(77, 53, seed=1, dtype=torch.bfloat16) if layout == "rows" else normal(53, 77, seed=1, dtype=torch.bfloat16).T
    x, t_x, t_w = normal(*rows, 53, dtype=torch.float64), normal(*rows, 53, seed=2, dtype=torch.float64), normal(77, 53, seed=3)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear(x, w).tanh().square().sum()

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype)).tanh().square().sum()

    def twice(f: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf, w), leaf, create_graph=True)
        return torch.autograd.grad((grad * t_x).sum(), leaf)[0]

    transforms: list[Callable[[Callable[..., Tensor]], Tensor]] = [
        lambda f: f(x, w),
        lambda f: torch.autograd.functional.vjp(f, (x, w))[1][0],
        lambda f: torch.autograd.functional.vjp(f, (x, w))[1][1],
        lambda f: torch.func.grad(f, 1)(x, w),
        lambda f: torch.func.vmap(torch.func.grad(f, 1), (0, None))(x, w),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, 0))(x, torch.stack([w] * len(x))),
        lambda f: torch.func.jvp(f, (x, w), (t_x, t_w.bfloat16()))[1],
        lambda f: torch.func.jvp(lambda x: f(x, w), (x,), (t_x,))[1],
        twice,
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-11, atol=1e-11)


class Widest(TorchDispatchMode):
    """Notes the most numbers that one tensor of 32 bits or more has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.itemsize > 2:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trains", [False, True])
def test_no_wide_weight_is_kept_or_ever_whole(trains: bool) -> None:
    x, w = normal(5, 64), normal(48, 64, seed=1, dtype=torch.bfloat16).requires_grad_(trains)

    def numbers(f: Callable[[Tensor, Tensor], Tensor]) -> int:
        with Widest() as widest:
            f(x.clone().requires_grad_(), w).sum().backward()
        return widest.numbers

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype))

    assert numbers(linear) <= 2**9 < numbers(plain) == w.numel()
    kept = [kept_bytes(f, x, w) for f in (linear, plain)]
    assert kept == [0, 4 * w.numel()]


def test_a_model_in_16_bits_is_the_float32_model_of_its_weights() -> None:
    params = half(random_params(SMALL))
    wide = {name: w.float() for name, w in params.items()}
    batch, rule = batch_of(SMALL.vocab_size), Lora(3, 8.0, ("*_proj.weight",))
    deltas = tree.map(lambda x: x + 0.01, rule.init(params, 0))

    def run(params: dict[str, Tensor]) -> Any:
        objective = sft(MODEL, rule)
        return value_and_grad(lambda t: objective(t, params, batch)[0])(deltas)

    torch.testing.assert_close(run(params), run(wide), rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        wanted = reference(SMALL, wide)(batch.tokens).logits
    torch.testing.assert_close(MODEL.forward(params, batch.tokens), wanted, rtol=1e-4, atol=1e-4)


def test_weights_that_train_stay_in_their_own_dtype() -> None:
    params, objective = random_params(SMALL), sft(MODEL, None)
    for trained, computed in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        frozen, whole = split_trainable({name: w.to(computed) for name, w in params.items()}, ("*",), params, trained)
        attached = apply_trainable(frozen, whole, None)
        assert all(attached[name] is leaf for name, leaf in whole.items())
        (value, _), grads = value_and_grad(objective, has_aux=True)(whole, frozen, batch_of(SMALL.vocab_size))
        assert value.total.dtype == torch.float32
        assert {g.dtype for g in grads.values()} == {trained}


def test_decoding_keeps_its_cache_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    params, made = half(random_params(SMALL)), []
    empty = decoder.empty_caches
    monkeypatch.setattr(decoder, "empty_caches", lambda *args: made.append(empty(*args)) or made[-1])
    for prompts in ([[1, 2], [3]], [[4]]):
        rows = greedy(MODEL, params, prompts, max_new_tokens=5, stop_ids=[])
        wide = {name: w.float() for name, w in params.items()}
        for prompt, row in zip(prompts, rows, strict=True):
            logits = MODEL.forward(wide, torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(row)[:, None])[:, 0]
            assert float((logits.amax(1) - chosen).max()) <= 2e-2 * float(logits.abs().max())
    assert {x.dtype for caches in made for x in tree.leaves(caches)} == {torch.bfloat16}


@pytest.mark.parametrize("scheme", [Int8(), Int4(32), Float8(), NF4()])
def test_few_rows_of_a_quantized_weight_are_as_precise_as_bfloat16(scheme: Scheme) -> None:
    q, x = quantize(normal(48, 256), scheme), normal(3, 256, seed=1)
    leaf = packed({"w": q})["w"]
    wanted = x.double() @ dequantize(q, torch.float64).T
    products: list[str] = []
    with bfloat16_products(products), torch.no_grad():
        y = linear(x, leaf)
    assert (y.dtype, products) == (torch.float32, [])
    assert float((y - wanted).abs().max()) < 2**-7 * float(wanted.abs().max())


PROGRAMS = {
    "lora": ["model.dtype=bfloat16"],
    "full": ["model.dtype=bfloat16"],
    "full in 16 bits": ["model.dtype=float32", "full.dtype=bfloat16"],
    "qlora": ["model.dtype=bfloat16"],
    "dpo": ["model.dtype=bfloat16"],
    "kd": ["model.dtype=bfloat16"],
    "quantize": ["model.dtype=bfloat16"],
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_no_program_multiplies_bfloat16(case: str, tiny: Path, tmp_path: Path, capsys: Any) -> None:
    name = case.partition(" ")[0]
    products: list[str] = []
    with bfloat16_products(products):
        assert main([name, *toy(name, tiny, tmp_path, steps=1), *PROGRAMS[case]]) == 0
    assert products == []
    printed = " ".join(capsys.readouterr().out.split())
    label = "full" if case == "full in 16 bits" else "model"
    assert f"{label}: this cpu multiplies no bfloat16, so weights stay in 16 bits" in printed


def test_no_expert_multiplies_bfloat16() -> None:
    experts = Experts(n_experts=4, n_active=2, d_ff=13, names="mixtral")
    sizes = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 20, "d_head": 6, "d_ff": 13, "vocab_size": 17}
    model = Model(mixtral.FAMILY, mixtral.Config(**sizes, experts=experts))
    params, rule, products = half(model.init(0, 0.3)), Lora(3, 8.0, ("*_proj.weight",)), []
    deltas, objective = rule.init(params, 0), sft(model, rule)
    with bfloat16_products(products):
        value_and_grad(lambda t: objective(t, params, batch_of(17))[0])(deltas)
        greedy(model, params, [[1, 2], [3]], max_new_tokens=3, stop_ids=[])
    assert products == []


def test_the_count_sees_what_a_processor_with_bfloat16_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: True)
    products: list[str] = []
    with bfloat16_products(products):
        logits = MODEL.forward(half(random_params(SMALL)), batch_of(SMALL.vocab_size).tokens)
    assert logits.dtype == torch.bfloat16
    assert {"mm", "bmm"} & set(products)
