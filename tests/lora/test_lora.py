"""Trees that adapt: LoRA, rsLoRA, DoRA, ranks and learning rates by glob, whole tensors beside deltas; all against PEFT."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from minitune import tree
from minitune.algorithms.merging import merge_trainable
from minitune.algorithms.objective import apply_trainable
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.interop.peft.layout import CONFIG, ORIGIN, WEIGHTS, Base
from minitune.interop.peft.load import load_adapter
from minitune.interop.peft.save import save_adapter
from minitune.lora import Lora, Onto, check_deltas, merge_error
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.nn import linear as nn_linear
from minitune.nn.linear import row_norms
from minitune.optim.adamw import AdamW
from minitune.optim.transforms import ScaleByGlob, chain
from minitune.quant.schemes import dequantize
from minitune.quant.tensors import QInt8
from minitune.types import Adapted, Batch, Delta, Mean, Trainable
from support.closeness import distance
from support.models import SMALL, randn, random_batch, random_params, reference

ATOL = 1e-5  # of the scale of logits or gradients
SEEDS = st.integers(0, 2**32)
TARGETS = ("*.self_attn.*_proj.weight", "*.mlp.*_proj.weight")
RANKS = {"*.layers.1.mlp.*": 5, "*.mlp.*": 1}
RULES = {
    "plain": Lora(3, 5.0, TARGETS),
    "ranks": Lora(3, 5.0, TARGETS, RANKS),
    "rslora": Lora(3, 5.0, TARGETS, rslora=True),
    "rslora with ranks": Lora(3, 5.0, TARGETS, RANKS, rslora=True),
    "dora": Lora(3, 5.0, TARGETS, dora=True),
    "dora with everything": Lora(3, 5.0, TARGETS, RANKS, rslora=True, dora=True),
}
Params = dict[str, torch.Tensor]
SMALL_NAMES = tuple(Model(llama.FAMILY, SMALL).shapes())


def config(**fields: Any) -> llama.Config:
    """SMALL with other fields; biases, so that a magnitude that reached them would show."""
    return llama.Config(**{f: getattr(SMALL, f) for f in SMALL.__struct_fields__} | {"mlp_bias": True, **fields})


def moved(leaves: Trainable, seed: int = 0, size: float = 0.3) -> dict[str, Any]:
    """A trainable tree with a random step taken from it, so that no part is at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda x: x + size * torch.randn(x.shape, generator=generator, dtype=x.dtype), leaves)


def logits(c: llama.Config, params: Params, tokens: torch.Tensor, trainable: Trainable, rule: Lora | None) -> torch.Tensor:
    return Model(llama.FAMILY, c).forward(apply_trainable(params, trainable, rule), tokens)


def save(folder: Path, trainable: Trainable, rule: Lora, names: Collection[str] = SMALL_NAMES) -> None:
    save_adapter(folder, trainable, rule, base=Base("base"), names=names)


# the rule


@settings(max_examples=10)
@given(name=st.sampled_from(sorted(RULES)), seed=SEEDS)
def test_fresh_deltas_change_nothing_and_merged_equals_adapted(name: str, seed: int) -> None:
    params, tokens, rule = random_params(SMALL, seed, torch.float64), random_batch(SMALL, 2, 9, seed).tokens, RULES[name]
    fresh = rule.init(params, seed)
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(fresh))
    like = [(path, leaf.shape, leaf.dtype, leaf.device.type) for path, leaf in tree.items(rule.like(params))]
    assert like == [(path, leaf.shape, leaf.dtype, "meta") for path, leaf in tree.items(fresh)]
    assert all(float(d.a.abs().max()) <= params[name].shape[1] ** -0.5 for name, d in fresh.items())
    base = logits(SMALL, params, tokens, {}, None)
    assert distance(logits(SMALL, params, tokens, fresh, rule), base) <= (1e-6 if rule.dora else 0.0)  # m is float32
    deltas = moved(tree.map(torch.Tensor.double, fresh), seed)
    before = tree.map(torch.clone, params)
    merged = rule.merge(params, deltas)
    adapted = logits(SMALL, params, tokens, deltas, rule)
    assert distance(logits(SMALL, merged, tokens, {}, None), adapted) <= 1e-12
    assert distance(adapted, base) > 1e-2
    torch.testing.assert_close(params, before, rtol=0, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_weight_is_the_papers_formula_at_the_weights_own_rank(rslora: bool, dora: bool) -> None:
    rule, params = Lora(3, 5.0, TARGETS, RANKS, rslora, dora), random_params(SMALL, dtype=torch.float64)
    fresh = rule.init(params, 0)
    deltas = moved(tree.map(torch.Tensor.double, fresh))
    ranks = {
        "model.layers.0.self_attn.q_proj.weight": 3,
        "model.layers.0.mlp.up_proj.weight": 1,
        "model.layers.1.mlp.down_proj.weight": 5,
    }
    for name, rank in ranks.items():
        (a, b, m), w = deltas[name], params[name]
        assert (a.shape, b.shape) == ((rank, w.shape[1]), (w.shape[0], rank))
        wanted = w + 5.0 / (rank**0.5 if rslora else rank) * sum(b[:, i : i + 1] * a[i] for i in range(rank))
        if dora:
            assert fresh[name].m.tolist() == pytest.approx([float(row.norm()) for row in w])
            wanted = torch.stack([m[i] * wanted[i] / wanted[i].norm() for i in range(len(wanted))])
        torch.testing.assert_close(rule.merge(params, deltas)[name], wanted)


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    params, rule, name = random_params(SMALL), Lora(2, 4.0, ("lm_head.weight",), dora=True), "lm_head.weight"
    w = params[name] * (torch.arange(17) != 3)[:, None]
    deltas = rule.init({name: w}, 0)
    torch.testing.assert_close(rule.merge({name: w}, deltas)[name], w)
    x = randn(2, 12, dtype=torch.float32)
    torch.testing.assert_close(nn_linear.linear(x, rule.apply({name: w}, deltas)[name]), x @ w.T)


def test_merge_rounds_once_and_merge_error_is_what_rounding_or_another_base_lost() -> None:
    params, rule, name = random_params(SMALL, dtype=torch.bfloat16), RULES["plain"], "model.layers.0.self_attn.q_proj.weight"
    w, delta = params[name], moved(rule.init(params, 0), size=0.02)[name]
    exact = rule.merged_weight(w, delta)
    merged = rule.merge(params, {name: delta})[name]
    wide = w.double() + 5.0 / 3 * delta.b.double() @ delta.a.double()
    torch.testing.assert_close(merged, wide.bfloat16(), rtol=0, atol=0)
    lost = float((merged.double() - wide).norm() / (wide - w.double()).norm())
    assert 0 < lost == pytest.approx(float(merge_error(merged, exact, w)), rel=1e-4)
    assert float(merge_error(exact, exact, w)) == 0
    assert float(merge_error(w, w, w)) == 0  # a delta that changes nothing loses nothing
    another = w.float() + 0.01
    away = 0.01 * w.numel() ** 0.5 / float((exact - w).norm())
    assert float(merge_error(rule.merged_weight(another, delta), exact, w)) == pytest.approx(away, rel=1e-4)


@pytest.mark.parametrize("onto", ["trained", "stored"])
def test_what_was_trained_over_quantized_weights_is_merged_onto_either_base(onto: Onto) -> None:
    stored, rule, whole = random_params(SMALL), RULES["plain"], "model.norm.weight"
    params = quantized(stored)
    deltas = moved(rule.init(params, 0))
    alone = next(iter(deltas))  # quantized, and without a delta
    deltas = {name: delta for name, delta in deltas.items() if name != alone}
    trainable = {**deltas, whole: stored[whole] + 0.25}
    merged, errors = merge_trainable(params, trainable, rule, stored=stored, onto=onto)
    dense = {n: w if isinstance(w, torch.Tensor) else dequantize(w, torch.float32) for n, w in params.items()}
    base = dense if onto == "trained" else stored
    wanted = rule.merge({**base, whole: trainable[whole]}, deltas)
    assert_trees_close(merged, wanted, 1e-6)
    assert not torch.equal(dense[alone], stored[alone])
    # float32 rounds nothing that counts, and the dense base has the whole error of the codes
    assert errors["trained"] < 1e-6 < 1e-3 < errors["stored"]
    half, _ = merge_trainable(params, trainable, rule, stored=stored, onto=onto, dtype=torch.bfloat16)
    assert all(torch.equal(half[name], w.bfloat16()) for name, w in merged.items())
    with pytest.raises(TypeError, match=r"is a Delta, expected the Lora rule that it was made by"):
        merge_trainable(params, trainable, None, stored=stored)


def test_lora_refuses_what_it_cannot_adapt() -> None:
    params = random_params(SMALL)
    with pytest.raises(InputError, match=r"embed_tokens\.weight \[17, 12\] is not a linear weight"):
        Lora(2, 2.0, ("*embed_tokens*",)).init(params, 0)
    with pytest.raises(InputError, match=r"norm\.weight \[12\] is not a linear weight"):
        Lora(2, 2.0, ("model.norm.weight",)).init(params, 0)
    with pytest.raises(InputError, match=r"'model\.layerz' matches no weight"):
        Lora(2, 2.0, ("model.layerz",)).init(params, 0)
    with pytest.raises(InputError, match=r"lora: ranks: 'lm_head\*' matches no weight"):
        Lora(2, 2.0, TARGETS, {"lm_head*": 3}).init(params, 0)
    tied = {name: w for name, w in params.items() if name != "lm_head.weight"}
    with pytest.raises(InputError, match=r"target 'lm_head\*' is the head, which this model ties to its embedding"):
        Lora(2, 2.0, (*TARGETS, "lm_head*")).init(tied, 0)


def test_deltas_are_applied_once_and_to_weights_that_are_there() -> None:
    params, rule = random_params(SMALL), RULES["plain"]
    deltas, name = rule.init(params, 0), "model.layers.0.self_attn.q_proj.weight"
    adapted = rule.apply(params, deltas)
    assert {key for key, leaf in adapted.items() if isinstance(leaf, Adapted)} == set(deltas)
    with pytest.raises(TypeError, match=rf"lora: {name} is adapted already, expected a weight of the base"):
        rule.apply(adapted, deltas)
    with pytest.raises(TypeError, match=rf"lora: {name} is not there, expected a weight of the base"):
        rule.apply({key: w for key, w in params.items() if key != name}, deltas)


def test_a_delta_can_not_be_multiplied_by_without_its_scale() -> None:
    params, tokens = random_params(SMALL), random_batch(SMALL, 1, 5).tokens
    deltas = RULES["plain"].init(params, 0)
    with pytest.raises(TypeError):  # with the message of the checked signatures, which the tests run under
        Model(llama.FAMILY, SMALL).forward({**params, **deltas}, tokens)
    linear = getattr(nn_linear.linear, "__wrapped__", nn_linear.linear)
    with pytest.raises(TypeError, match=r"linear: a leaf of the params is a Delta, expected a weight; make .* by Lora\.apply"):
        linear(torch.ones(2, 12), deltas["model.layers.0.self_attn.q_proj.weight"])


def test_deltas_of_another_base_are_refused() -> None:
    params = random_params(SMALL)
    fitting = Lora(2, 2.0, ("lm_head.weight",)).init(params, 0)
    check_deltas(params, {**fitting, "model.norm.weight": torch.ones(12)}, "here")
    with pytest.raises(InputError, match=r"here adapts lm_head\.weight, which this model does not have"):
        check_deltas({}, fitting, "here")
    wanted = r"here has a \[2, 12\] and b \[17, 2\] for lm_head\.weight, expected \[r, 13\] and \[17, r\]"
    with pytest.raises(InputError, match=wanted):
        check_deltas({"lm_head.weight": torch.zeros(17, 13)}, fitting, "here")
    with pytest.raises(InputError, match=r"for lm_head\.weight, expected \[r, in\] and \[out, r\]"):
        check_deltas({"lm_head.weight": torch.zeros(17)}, fitting, "here")
    with pytest.raises(InputError, match=r"here has model\.norm\.weight \[13\], expected \[12\]"):
        check_deltas(params, {"model.norm.weight": torch.ones(13)}, "here")


# operations


@given(out=st.integers(1, 9), in_=st.integers(1, 11), rank=st.integers(1, 5), seed=SEEDS)
def test_row_norms_equal_the_sum_that_they_never_build(out: int, in_: int, rank: int, seed: int) -> None:
    w, delta = randn(out, in_, seed=seed), Delta(randn(rank, in_, seed=seed + 1), randn(out, rank, seed=seed + 2))
    wanted = (w + delta.b @ delta.a).norm(dim=1)
    # the square is a difference of larger terms: its error is theirs, whatever is left of them
    size = (w.norm(dim=1) + delta.b.norm(dim=1) * delta.a.norm()) ** 2
    assert bool(((row_norms(Adapted(w, *delta)) ** 2 - wanted**2).abs() <= 1e-14 * size).all())
    low = row_norms(tree.map(torch.Tensor.bfloat16, Adapted(w, *delta)))
    assert low.dtype == torch.float32
    exact = (w.bfloat16().double() + delta.b.bfloat16().double() @ delta.a.bfloat16().double()).norm(dim=1)
    assert bool(((low.double() ** 2 - exact**2).abs() <= 1e-5 * size).all())


@given(n=st.integers(1, 4), out=st.integers(1, 9), in_=st.integers(1, 11), rank=st.integers(1, 3), seed=SEEDS)
def test_a_dora_linear_equals_its_formula_with_the_norm_held_constant(n: int, out: int, in_: int, rank: int, seed: int) -> None:
    x, w, bias = randn(n, in_, seed=seed), randn(out, in_, seed=seed + 1), randn(out, seed=seed + 2)
    delta = Delta(randn(rank, in_, seed=seed + 3), randn(out, rank, seed=seed + 4), randn(out, seed=seed + 5))
    leaves = [x.requires_grad_(), *(leaf.requires_grad_() for leaf in delta)]
    total = w + delta.b @ delta.a
    wanted = x @ (total * (delta.m / total.detach().norm(dim=1))[:, None]).T + bias
    actual = nn_linear.linear(x, Adapted(w, *delta), bias)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    weight = randn(n, out, seed=seed + 6)
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (actual, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def quantized(params: Params) -> dict[str, Any]:
    """int8 codes, one scale a row, for every projection."""

    def codes(w: torch.Tensor) -> QInt8:
        scale = w.abs().amax(1, keepdim=True) / 127
        return QInt8((w / scale).round().to(torch.int8), scale)

    return {name: codes(w) if name.endswith("_proj.weight") else w for name, w in params.items()}


@pytest.mark.parametrize("name", ["plain", "dora with everything"])
def test_deltas_over_quantized_weights_equal_deltas_over_what_these_stand_for(name: str) -> None:
    c, rule = config(), RULES[name]
    codes = quantized(random_params(c))
    dense = {n: w if isinstance(w, torch.Tensor) else dequantize(w, torch.float32) for n, w in codes.items()}
    fresh, batch = rule.init(codes, 4), random_batch(c, 3, 11)
    assert_trees_close(fresh, rule.init(dense, 4), 1e-6)
    deltas = moved(fresh)
    for wrap in (lambda f: f, remat):
        losses = [loss_and_grads(c, params, deltas, rule, batch, wrap) for params in (codes, dense)]
        assert_trees_close(losses[0], losses[1], 1e-5)
    with pytest.raises(TypeError, match=r"q_proj\.weight is a QInt8, expected a dense tensor to merge onto"):
        rule.merge(codes, deltas)
    assert (
        distance(logits(c, rule.merge(dense, deltas), batch.tokens, {}, None), logits(c, codes, batch.tokens, deltas, rule))
        <= ATOL
    )


def loss_and_grads(
    c: llama.Config, params: Params, trainable: Trainable, rule: Lora, batch: Batch, wrap: Callable = lambda f: f
) -> tuple[Mean, Trainable]:
    def objective(leaves: Trainable) -> Mean:
        adapted = apply_trainable(params, leaves, rule)
        return Mean.of(Model(llama.FAMILY, c, wrap).token_losses(adapted, batch, CrossEntropy()), batch.target_mask())

    return value_and_grad(objective)(trainable)


def assert_trees_close(actual: tree.Tree, wanted: tree.Tree, tolerance: float) -> None:
    """Every leaf within tolerance of the largest value of the wanted tree."""
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(wanted)) or 1.0
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * scale), actual, wanted)


# PEFT


WHOLE = {"nothing": (), "norms": ("*norm.weight",), "ends": ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")}


def trained(c: llama.Config, params: Params, rule: Lora, whole: str) -> dict[str, Any]:
    """Deltas and, beside them, whole tensors, all some way from where they began."""
    globs = [glob for glob in WHOLE[whole] if not (c.tie_embeddings and glob == "lm_head.weight")]
    whole_weights = {name: params[name] for name in tree.select(params, globs, "test")} if globs else {}
    return moved({**rule.init(params, 0), **whole_weights})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("name", RULES)
def test_peft_reads_what_we_write_and_we_read_it_back(name: str, whole: str, tied: bool, tmp_path: Path) -> None:
    c, rule = config(tie_embeddings=tied), RULES[name]
    params, tokens = random_params(c), random_batch(c, 3, 13).tokens
    trainable = trained(c, params, rule, whole)
    save(tmp_path / "adapter", trainable, rule, params)

    ours = logits(c, params, tokens, trainable, rule)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference(c, params), tmp_path / "adapter")(tokens).logits
        final = {**params, **{n: x for n, x in trainable.items() if isinstance(x, torch.Tensor)}}
        deltas = {n: x for n, x in trainable.items() if isinstance(x, Delta)}
        merged = reference(c, dict(rule.merge(final, deltas)))(tokens).logits
    assert distance(ours, theirs) <= ATOL
    assert distance(ours, merged) <= ATOL
    for part in trainable:  # nothing that was written is without effect
        assert distance(logits(c, params, tokens, {n: x for n, x in trainable.items() if n != part}, rule), theirs) > 10 * ATOL

    rule_back, back, _ = load_adapter(tmp_path / "adapter", names=params)
    assert {n: rule_back.scale(d) for n, d in back.items() if isinstance(d, Delta)} == pytest.approx(
        {n: rule.scale(d) for n, d in trainable.items() if isinstance(d, Delta)}
    )
    assert set(back) == set(trainable)
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), {n: back[n] for n in trainable}, trainable)
    check_deltas(params, back, "here")
    assert rule_back.dora == rule.dora
    again = rule_back.init(params, 1)  # the rule goes on where the adapter was: same weights, same ranks
    assert {n: d.a.shape for n, d in again.items()} == {n: d.a.shape for n, d in rule.init(params, 1).items()}


def test_peft_reads_a_delta_on_the_head(tmp_path: Path) -> None:
    params, tokens, rule = random_params(SMALL), random_batch(SMALL, 3, 13).tokens, Lora(3, 5.0, ("lm_head.weight",), dora=True)
    deltas = moved(rule.init(params, 0))
    save(tmp_path, deltas, rule)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference(SMALL, params), tmp_path)(tokens).logits
    assert distance(logits(SMALL, params, tokens, deltas, rule), theirs) <= ATOL


MADE_BY_PEFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"down_proj": 2, r"model.layers.1.self_attn.q_proj": 5}},
    "rank_pattern as a regular expression": {"rank_pattern": {r"layers\.[0-9]+\.mlp\.down_proj": 2}},
    "rslora": {"use_rslora": True},
    "rslora with ranks": {"use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "alpha_pattern as sqrt(rank)": {"r": 4, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 3.5}},
    "any alphas": {"alpha_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 9}, "use_dora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm", "embed_tokens", "lm_head"]},
    "a tied embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "everything": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 2}, "modules_to_save": ["norm", "k_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_BY_PEFT)
def test_an_adapter_that_peft_made_is_read(name: str, tmp_path: Path) -> None:
    c = config(attention_bias=True, tie_embeddings="tied" in name)
    params, tokens = random_params(c), random_batch(c, 2, 13).tokens
    fields = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | MADE_BY_PEFT[name]
    model = get_peft_model(reference(c, params), LoraConfig(**fields))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for x in (x for x in model.parameters() if x.requires_grad):
            x += 0.3 * torch.randn(x.shape, generator=generator)
        wanted = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)
    rule, trainable, base = load_adapter(tmp_path, names=params)
    assert base is None
    check_deltas(params, trainable, "here")
    assert distance(logits(c, params, tokens, trainable, rule), wanted) <= ATOL
    assert distance(logits(c, params, tokens, {}, None), wanted) > 1000 * ATOL


@pytest.mark.parametrize("name", ["plain", "rslora with ranks", "dora", "dora with everything"])
def test_gradients_of_a_step_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    c, rule = config(), RULES[name]
    params, batch = random_params(c), random_batch(c, 3, 13, packed=False)
    batch = batch._replace(segment_ids=torch.ones_like(batch.segment_ids))  # transformers sees no padding here
    trainable = trained(c, params, rule, "norms")
    save(tmp_path, trainable, rule)
    loss, grads = loss_and_grads(c, params, trainable, rule, batch)

    model = PeftModel.from_pretrained(reference(c, params), tmp_path, is_trainable=True)
    nats = F.cross_entropy(model(batch.tokens).logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    total = (nats * batch.target_mask()[:, 1:]).sum()
    total.backward()
    assert float(loss.total) == pytest.approx(float(total.detach()), rel=1e-5)
    theirs = {n: x.grad for n, x in model.named_parameters() if x.grad is not None}
    scale = max(float(g.abs().max()) for g in theirs.values())
    parts = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    n_compared = 0
    for path, g in tree.items(grads):
        module, part = path.rsplit(".weight.", 1) if path.endswith((".a", ".b", ".m")) else (path.removesuffix(".weight"), None)
        key = f"base_model.model.{module}." + (parts[part] if part else "modules_to_save.default.weight")
        assert float((g - theirs[key]).abs().max()) <= ATOL * scale, path
        n_compared += 1
    assert n_compared == len(theirs)


def test_what_deltas_were_trained_on_is_kept_beside_them(tmp_path: Path) -> None:
    rule, params = RULES["plain"], random_params(SMALL)
    quantization = {"scheme": {"kind": "nf4"}, "weights": ["*_proj.weight"], "exceptions": {"a*": None}}
    save_adapter(tmp_path, rule.init(params, 0), rule, base=Base("some/base", "f00d", quantization), names=params)
    assert load_adapter(tmp_path, names=SMALL_NAMES)[2] == Base("some/base", "f00d", quantization)
    PeftModel.from_pretrained(reference(SMALL, params), tmp_path)  # which does not mind the file
    (tmp_path / ORIGIN).write_text('{"base": 3}', encoding="utf-8")
    with pytest.raises(InputError, match=r"minitune\.json can't be read .*; remove it to go on without knowing the base"):
        load_adapter(tmp_path, names=SMALL_NAMES)
    (tmp_path / ORIGIN).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"minitune\.json can't be read"):
        load_adapter(tmp_path, names=SMALL_NAMES)
    (tmp_path / ORIGIN).unlink()
    assert load_adapter(tmp_path, names=SMALL_NAMES)[2] is None


def test_a_module_with_a_delta_and_a_whole_tensor_is_refused(tmp_path: Path) -> None:
    rule, params = RULES["plain"], random_params(config())
    both = {**rule.init(params, 0), "model.layers.0.mlp.up_proj.bias": params["model.layers.0.mlp.up_proj.bias"]}
    with pytest.raises(InputError, match=r"up_proj\.bias trains whole and model\.layers\.0\.mlp\.up_proj has a delta"):
        save(tmp_path / "adapter", both, rule)


def test_whole_projections_are_kept_with_their_biases_or_refused(tmp_path: Path) -> None:
    c, rule = config(attention_bias=True), Lora(2, 4.0, ("*.q_proj.weight",))
    params, tokens = random_params(c), random_batch(c, 3, 13).tokens
    trainable = moved({**rule.init(params, 0), **{n: w for n, w in params.items() if ".k_proj." in n}})
    save(tmp_path / "adapter", trainable, rule, params)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(reference(c, params), tmp_path / "adapter")(tokens).logits
    assert distance(logits(c, params, tokens, trainable, rule), theirs) <= ATOL
    partly = {n: x for n, x in trainable.items() if not n.endswith("0.self_attn.k_proj.bias")}
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.k_proj\.bias does not train, but another tensor of its module"):
        save(tmp_path / "partly", partly, rule, params)


def test_an_adapter_that_unties_a_tied_head_is_refused(tmp_path: Path) -> None:
    c, rule = config(tie_embeddings=True), RULES["plain"]
    params = random_params(c)
    trainable = trained(c, params, rule, "ends")
    save(tmp_path / "one", trainable, rule)
    with pytest.raises(InputError, match=r"trains model\.embed_tokens\.weight apart from the head, which this model ties to it"):
        load_adapter(tmp_path / "one", names=params)
    save(tmp_path / "two", {**trainable, "lm_head.weight": trainable["model.embed_tokens.weight"] + 1}, rule)
    with pytest.raises(InputError, match="apart from the head"):
        load_adapter(tmp_path / "two", names=params)


def adapter(folder: Path, *, dora: bool = False, **changes: object) -> Path:
    rule = Lora(2, 4.0, ("lm_head.weight",), dora=dora)
    save(folder, rule.init(random_params(SMALL), 0), rule)
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**fields, **changes}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"lora_B\.weight, expected .* \.lora_magnitude_vector of every adapted module with use_dora = true"),
        ({"lora_bias": True}, "has lora_bias = True, expected LoRA, rsLoRA or DoRA alone; merge it with PEFT first"),
        ({"bias": "all"}, "has bias = 'all'"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices"),
        ({"a_field_of_tomorrow": 1}, "has a_field_of_tomorrow = 1"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights = 'pissa_niter_4', which changes"),
        ({"peft_type": "IA3"}, r"'IA3' - at `\$\.peft_type`"),
        ({"r": 3}, r"lm_head has A \[2, 12\] and B \[17, 2\], expected \[3, in\] and \[out, 3\]"),
        ({"rank_pattern": {"head": 3, "lm_.*": 4}}, r"lm_head has A \[2, 12\] and B \[17, 2\], expected \[4, in\]"),
        ({"rank_pattern": {"(": 3}}, r"has '\(' as a pattern, expected a regular expression"),
        ({"lora_alpha": 0}, r"Expected `float` > 0.0 - at `\$\.lora_alpha`"),
        ({"r": "two"}, "Expected `int`, got `str`"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_understood_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_adapter(adapter(tmp_path / "adapter", **changes), names=SMALL_NAMES)


def test_an_adapter_with_missing_or_odd_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json does not exist"):
        load_adapter(tmp_path, names=SMALL_NAMES)
    folder = adapter(tmp_path / "adapter", dora=True)
    tensors, head = load_file(folder / WEIGHTS), "base_model.model.lm_head"

    def refused(parts: dict[str, torch.Tensor], message: str) -> None:
        save_file(parts, folder / WEIGHTS)
        with pytest.raises(InputError, match=message):
            load_adapter(folder, names=SMALL_NAMES)

    only_a = {k: v for k, v in tensors.items() if "lora_A" in k}
    refused(only_a, r"holds base_model\.model\.lm_head\.lora_A\.weight, expected \.lora_A\.weight, \.lora_B\.weight")
    refused(
        {**tensors, f"{head}.weight": torch.ones(17, 12)},
        r"holds lm_head\.weight beside a delta on it, expected the base's own weight",
    )
    refused({**tensors, f"{head}.lora_B.bias": torch.ones(17)}, r"holds base_model\.model\.lm_head\.lora_B\.bias, expected")
    refused({**tensors, f"{head}.lora_magnitude_vector": torch.ones(5)}, r"lm_head has a magnitude \[5\], expected \[17\]")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="is no whole safetensors file"):
        load_adapter(folder, names=SMALL_NAMES)


# learning rates


def test_learning_rates_by_glob_equal_torchs_parameter_groups_over_20_steps() -> None:
    rule, params = RULES["dora with everything"], random_params(SMALL)
    factors = {"*.layers.0.*.b": 2.5, "*.b": 16.0, "*norm.weight": 0.1, "*.m": 0.0}
    trainable = trained(SMALL, params, rule, "norms")

    def factor(path: str) -> float:
        by_hand = {".b": 2.5 if ".layers.0." in path else 16.0, ".m": 0.0, ".a": 1.0}
        return by_hand.get(path[-2:], 0.1)

    leaves = {path: torch.nn.Parameter(x.clone()) for path, x in tree.items(trainable)}
    assert {factor(path) for path in leaves} == {2.5, 16.0, 0.1, 0.0, 1.0}
    theirs = torch.optim.AdamW([{"params": [x], "lr": 1e-3 * factor(path)} for path, x in leaves.items()], weight_decay=0.3)
    ours = chain(AdamW(lr=1e-3, weight_decay=0.3), ScaleByGlob(factors))
    state, generator = ours.init(trainable), torch.Generator().manual_seed(3)
    for _ in range(20):
        grads = tree.map(lambda x: torch.randn(x.shape, generator=generator), trainable)
        for leaf, g in zip(leaves.values(), tree.leaves(grads), strict=True):
            leaf.grad = g.clone()
        theirs.step()
        updates, state = ours.update(grads, state, trainable)
        trainable = tree.add(trainable, updates)
        for path, x in tree.items(trainable):
            torch.testing.assert_close(x, leaves[path].detach(), rtol=1e-6, atol=1e-6)


def test_a_learning_rate_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"optim: lr factor: '\*\.magnitude' matches no weight; the nearest are .*\.a"):
        ScaleByGlob({"*.a": 1.0, "*.magnitude": 2.0}).init(RULES["plain"].init(random_params(SMALL), 0))
