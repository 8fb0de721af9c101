"""Equal to independent implementations: transformers, torch.optim, torch.func. Each mechanism is shown to matter."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.hardware import product_dtype
from minitune.inference.generate import greedy
from minitune.losses.token import CrossEntropy
from minitune.models import Model, block, rope_scaling
from minitune.models.families import llama
from minitune.models.mixers import grouped_query
from minitune.nn.attention.attention import attention
from minitune.optim.adamw import AdamW
from minitune.optim.schedules import Constant, Cosine, Linear, ScaleBySchedule, Schedule
from minitune.optim.sgd import SGD
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.types import Mean
from support.closeness import distance
from support.models import SMALL, configs, random_batch, random_params, reference, widened

ATOL = 1e-5  # of the logit scale


@given(config=configs(), seed=st.integers(0, 2**32), length=st.integers(2, 37), n_rows=st.integers(1, 3))
def test_llama_logits_equal_transformers(config: llama.Config, seed: int, length: int, n_rows: int) -> None:
    params = random_params(config, seed)
    tokens = random_batch(config, n_rows, length, seed).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        logits = Model(llama.FAMILY, config).forward(params, tokens)
    assert distance(logits, wanted) <= ATOL


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, ATOL), (torch.float64, 1e-12)])
@settings(max_examples=12)
@given(config=configs(), seed=st.integers(0, 2**32), length=st.integers(2, 29))
def test_llama_gradients_equal_transformers(
    dtype: torch.dtype, atol: float, config: llama.Config, seed: int, length: int
) -> None:
    params, batch = random_params(config, seed, dtype), random_batch(config, 2, length, seed, packed=False)
    batch = batch._replace(segment_ids=torch.ones_like(batch.segment_ids))  # transformers sees no padding here
    with widened() if dtype == torch.float64 else nullcontext():
        hf = reference(config, params)
        mask = batch.target_mask()
        logits = hf(batch.tokens).logits[:, :-1]
        nats = F.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        (nats * mask[:, 1:]).sum().backward()
        wanted = dict(hf.named_parameters())
        scale = max(float(p.grad.abs().max()) for p in wanted.values()) or 1.0
        for wrap in (lambda f: f, remat):
            model = Model(llama.FAMILY, config, wrap)
            loss, grads = value_and_grad(lambda p, m=model: Mean.of(m.token_losses(p, batch, CrossEntropy()), mask))(params)
            assert loss.total == pytest.approx(float((nats * mask[:, 1:]).sum().detach()), rel=atol, abs=atol)
            assert int(loss.weight) == int(mask.sum())
            assert {n: float((grads[n] - wanted[n].grad).abs().max().detach()) / scale for n in params} == pytest.approx(
                dict.fromkeys(params, 0.0), abs=atol
            )


MUTATIONS = {
    "no RoPE": (grouped_query, "rotate", lambda x, rope: x),
    "RoPE on interleaved pairs": (
        grouped_query,
        "rotate",
        lambda x, rope: x * rope[0][:, None] + x.roll(1, -1) * rope[1][:, None],
    ),
    "no causal mask": (
        grouped_query,
        "attention",
        lambda q, k, v, key_range, **rest: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    ),
    "no scaling of scores": (
        grouped_query,
        "attention",
        lambda q, k, v, key_range, **rest: attention(q, k, v, key_range, scale=1.0),
    ),
    "key heads in another order": (
        grouped_query,
        "attention",
        lambda q, k, v, key_range, **rest: attention(q, k.flip(1), v.flip(1), key_range),
    ),
    "no RoPE scaling": (rope_scaling, "Llama3", type(None)),
    "norm without epsilon": (block, "rms_norm", lambda x, w, eps, kind: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True))),
    "relu for silu": (block, "ACTIVATIONS", {"silu": lambda gate, up: gate.relu() * up}),
    "gate and up exchanged": (block, "ACTIVATIONS", {"silu": lambda gate, up: F.silu(up) * gate}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_golden_test_fails_when_a_mechanism_is_taken_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama.Config(
        n_layers=2, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17, norm_eps=1e-2, rope_theta=100.0,
        rope_scaling=rope_scaling.Llama3(4.0, 1.0, 4.0, 13), max_positions=64, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    params, tokens = random_params(config), random_batch(config, 2, 23).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        assert distance(Model(llama.FAMILY, config).forward(params, tokens), wanted) <= ATOL
        module, attribute, mutant = MUTATIONS[name]
        monkeypatch.setattr(module, attribute, mutant)
        assert distance(Model(llama.FAMILY, config).forward(params, tokens), wanted) > 100 * ATOL


@pytest.mark.parametrize("dropped", ["q_proj.bias", "o_proj.bias", "down_proj.bias"])
def test_the_golden_test_fails_when_a_bias_is_dropped(dropped: str) -> None:
    config = llama.Config(**{f: getattr(SMALL, f) for f in SMALL.__struct_fields__} | {"attention_bias": True, "mlp_bias": True})
    params, tokens = random_params(config), random_batch(config, 2, 11).tokens
    with torch.no_grad():
        wanted = reference(config, params)(tokens).logits
        kept = {name: w for name, w in params.items() if not name.endswith(dropped)}
        assert distance(Model(llama.FAMILY, config).forward(kept, tokens), wanted) > 100 * ATOL


def test_llama_in_bfloat16_is_within_its_own_rounding_of_float32() -> None:
    params, tokens = random_params(SMALL), random_batch(SMALL, 3, 19).tokens
    half = {name: w.bfloat16() for name, w in params.items()}
    exact = Model(llama.FAMILY, SMALL).forward({name: w.float() for name, w in half.items()}, tokens)
    ours = Model(llama.FAMILY, SMALL).forward(half, tokens)
    with torch.no_grad():
        theirs = reference(SMALL, half)(tokens).logits
    assert ours.dtype == product_dtype(torch.bfloat16, torch.device("cpu"))
    assert distance(ours.float(), exact) <= 2 * distance(theirs.float(), exact)


@settings(max_examples=8)
@given(config=configs(scaling="default"), seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_greedy_decoding_equals_the_full_forward_and_transformers(config: llama.Config, seed: int, lengths: list[int]) -> None:
    params, n_new = random_params(config, seed), 5
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    stop = int(torch.randint(0, config.vocab_size, (), generator=generator))
    answers = greedy(Model(llama.FAMILY, config), params, prompts, max_new_tokens=n_new, stop_ids=[stop])
    hf = reference(config, params)
    for prompt, row in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in range(n_new):
            tokens.append(int(Model(llama.FAMILY, config).forward(params, torch.tensor([tokens]))[0, -1].argmax()))
        whole = tokens[len(prompt) :]
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
        theirs = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=n_new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == whole


def test_greedy_decoding_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="a prompt is empty, expected at least one token"):
        greedy(Model(llama.FAMILY, SMALL), random_params(SMALL), [[1], []], max_new_tokens=3, stop_ids=[])


OPTIMIZERS = {
    "adamw": (AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0)),
    "adamw with decay": (
        AdamW(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
    ),
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd with momentum": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "sgd with nesterov": (
        SGD(lr=0.1, momentum=0.7, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_optimizers_equal_torch_over_20_steps(name: str, max_norm: float | None) -> None:
    ours, theirs = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(3)
    params = {
        "w": torch.randn(7, 11, generator=generator),
        "b": (torch.randn(5, generator=generator), torch.randn(1, generator=generator)),
    }
    leaves = [torch.nn.Parameter(x.clone()) for x in tree.leaves(params)]
    reference_optimizer: torch.optim.Optimizer = theirs(leaves)
    transform = chain(ClipByGlobalNorm(max_norm), ours) if max_norm else ours
    state = transform.init(params)
    for _ in range(20):
        grads = tree.map(lambda x: torch.randn(x.shape, generator=generator), params)
        for leaf, g in zip(leaves, tree.leaves(grads), strict=True):
            leaf.grad = g.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        reference_optimizer.step()
        updates, state = transform.update(grads, state, params)
        params = tree.add(params, updates)
        for leaf, ours_leaf in zip(leaves, tree.leaves(params), strict=True):
            torch.testing.assert_close(ours_leaf, leaf.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("schedule", "curve"), [
    (Constant(warmup_steps=3), lambda t: min(1.0, (t + 1) / 3)),
    (Linear(warmup_steps=2, end=0.1), lambda t: (t + 1) / 2 if t < 2 else 1 - 0.9 * (t - 2) / 8),
    (Cosine(end=0.2), lambda t: 0.2 + 0.4 * (1 + torch.cos(torch.tensor(torch.pi * t / 10, dtype=torch.float64)).item())),
])  # fmt: skip
def test_schedules_equal_torchs_lambda_lr(schedule: Schedule, curve: Callable[[int], float]) -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    theirs = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, curve)
    ours = chain(AdamW(lr=0.1, weight_decay=0.1), ScaleBySchedule(schedule, 10))
    params = {"w": parameter.detach().clone()}
    state = ours.init(params)
    for t in range(10):
        parameter.grad = parameter.detach().sin()
        updates, state = ours.update({"w": params["w"].sin()}, state, params)
        params = tree.add(params, updates)
        assert float(schedule.factor(torch.tensor(t), 10)) == pytest.approx(curve(t))
        theirs.step()
        scheduler.step()
        torch.testing.assert_close(params["w"], parameter.detach(), rtol=1e-6, atol=1e-6)


@settings(max_examples=10)
@given(config=configs(), seed=st.integers(0, 2**32), length=st.integers(2, 23))
def test_value_and_grad_equals_torch_func(config: llama.Config, seed: int, length: int) -> None:
    params, batch = random_params(config, seed, torch.float64), random_batch(config, 2, length, seed)

    def objective(p: tree.Tree) -> Mean:
        return Mean.of(Model(llama.FAMILY, config).token_losses(p, batch, CrossEntropy()), batch.target_mask())

    loss, grads = value_and_grad(objective)(params)
    wanted, total = torch.func.grad_and_value(lambda p: objective(p).total)(params)
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=1e-12)
    for name in params:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-10, atol=1e-10)
