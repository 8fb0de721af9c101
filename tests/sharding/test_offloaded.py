"""Frozen weights that lie on the host or in a file: the same steps to the last bit, and nothing fetched outlives its block."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.algorithms import sweep
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.merging import merge_trainable
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import per_example
from minitune.inference.generate import greedy
from minitune.lora import Lora
from minitune.losses.preference import Dpo
from minitune.losses.token import CrossEntropy
from minitune.models.block import block
from minitune.optim.adamw import AdamW
from minitune.quant.schemes import NF4, Int4, Int8, quantize
from minitune.sharding import gather as gather_module
from minitune.sharding.gather import gather
from minitune.sharding.offloaded import Carrier, OffloadedTensor
from minitune.steps import kd_step, preference_step, sft_step
from minitune.types import Mean, Pairs, TrainState
from support.families import config_of
from support.models import SMALL, configs, model_of, random_batch, random_deltas, random_params
from support.offloaded import in_file, read_again

RULE = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",))
DORA = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",), dora=True)
SCHEMES = {"dense": None, "int8": Int8(), "int4": Int4(group=32), "nf4": NF4()}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def quantized(params: Any, scheme: Any) -> Any:
    """Params with codes for the matrices of the blocks, where the scheme takes their shape."""
    group = 32 if isinstance(scheme, Int4) else 2
    names = [name for name, w in params.items() if name.endswith("_proj.weight") and w.shape[1] % group == 0]
    return params if scheme is None else {**params, **{name: quantize(params[name], scheme) for name in names}}


def same(x: Any, y: Any) -> None:
    """Trees are equal to the last bit."""
    for (path, one), (_, other) in zip(tree.items(x), tree.items(y), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), path


def stepped(params: Any, deltas: Any, rule: Lora, model: Any, batches: Any, kind: str = "sft", teacher: Any = None) -> Any:
    """(state, metrics) after a step on each batch."""
    optimizer, how = AdamW(lr=0.01, weight_decay=0.1), {"micro_batch": 2}
    if kind == "dpo":
        step = preference_step(model, rule, optimizer, Dpo(), {}, **how)
    elif kind == "kd":
        step = kd_step(model, rule, optimizer, Teacher(model, teacher), **how)
    else:
        step = sft_step(model, rule, optimizer, **how)
    state, metrics = step.init(deltas), []
    for batch in batches:
        state, one = step.update(params, state, batch)
        metrics.append(one)
    return tuple(state), metrics


@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(config=configs(), scheme=st.sampled_from([*SCHEMES]), n_remat=st.integers(0, 3), rule=st.sampled_from([RULE, DORA]))
def test_steps_are_those_of_weights_that_stay(tmp_path_factory: Any, config: Any, scheme: str, n_remat: int, rule: Lora) -> None:
    weights = random_params(config)
    params, deltas = quantized(weights, SCHEMES[scheme]), random_deltas(weights, rule)
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    away = in_file(params, path)
    model = model_of(config)._replace(n_remat=min(n_remat, config.n_layers))
    batches = [random_batch(config, 3, 11, seed) for seed in (0, 1)]
    same(stepped(away, deltas, rule, model, batches), stepped(read_again(params, path), deltas, rule, model, batches))


@pytest.mark.parametrize("kind", ["dpo", "kd"])
@pytest.mark.parametrize("n_remat", [0, 1])
def test_references_and_teachers_come_from_a_file_too(tmp_path: Path, kind: str, n_remat: int) -> None:
    weights, other = random_params(SMALL), random_params(SMALL, 7)
    deltas, rows = random_deltas(weights, RULE), [random_batch(SMALL, 3, 11, seed) for seed in range(4)]
    batches = [Pairs(rows[0], rows[1]), Pairs(rows[2], rows[3])] if kind == "dpo" else rows[:2]
    model = model_of(SMALL)._replace(n_remat=n_remat)
    away, teacher = in_file(weights, tmp_path / "base"), in_file(other, tmp_path / "other")
    found = stepped(away, deltas, RULE, model, batches, kind, teacher)
    base, other = read_again(weights, tmp_path / "base"), read_again(other, tmp_path / "other")
    same(found, stepped(base, deltas, RULE, model, batches, kind, other))


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_experts_come_from_a_file_too(tmp_path: Path, name: str) -> None:
    config = config_of(name)
    weights = random_params(config)
    deltas, model = random_deltas(weights, RULE), model_of(config)._replace(n_remat=1)
    batches = [random_batch(config, 2, 11)]
    found = stepped(in_file(weights, tmp_path / "w"), deltas, RULE, model, batches)
    same(found, stepped(read_again(weights, tmp_path / "w"), deltas, RULE, model, batches))


def test_what_is_stored_in_fewer_bits_is_widened_as_it_comes(tmp_path: Path) -> None:
    weights = {name: w.bfloat16().float() for name, w in random_params(SMALL).items()}
    deltas, batches = random_deltas(weights, RULE), [random_batch(SMALL, 3, 11)]
    away = in_file(weights, tmp_path / "w", stored=torch.bfloat16)
    model = model_of(SMALL)
    same(stepped(away, deltas, RULE, model, batches), stepped(read_again(weights, tmp_path / "w"), deltas, RULE, model, batches))


@pytest.mark.parametrize("n_remat", [0, 2])
def test_under_transforms_and_in_a_sweep_gradients_are_the_same(tmp_path: Path, n_remat: int) -> None:
    weights, model = random_params(SMALL), model_of(SMALL)._replace(n_remat=n_remat)
    away = in_file(weights, tmp_path / "w")
    deltas, batch = random_deltas(weights, RULE), random_batch(SMALL, 4, 9)

    def gradients(params: Any) -> Any:
        def of_row(leaves: Any, row: Any) -> Mean:
            return sft(model, RULE)(leaves, params, tree.map(lambda x: x[None], row))[0]

        rows = per_example(of_row, chunk=2)(deltas, batch)
        whole = torch.func.grad(lambda leaves: sft(model, RULE)(leaves, params, batch)[0].total)(deltas)
        rules, stacked = [RULE, RULE], sweep.stack([deltas, random_deltas(weights, RULE, 5)])
        optimizers = [AdamW(lr=0.01), AdamW(lr=0.02)]
        step = sweep.sweep_step(model, CrossEntropy(), rules, optimizers, micro_batch=1)
        states = [o.init(d) for o, d in zip(optimizers, sweep.unstack(stacked, 2), strict=True)]
        swept = step.update(params, TrainState(stacked, states), tree.map(lambda x: x.unflatten(0, (2, 2)), batch))
        return rows, whole, swept[0].trainable, swept[1]

    same(gradients(away), gradients(read_again(weights, tmp_path / "w")))


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_the_same(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    config = type(SMALL)(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_ff=96, vocab_size=37)
    params: Any = quantized(random_params(config, dtype=dtype), SCHEMES[scheme])
    model, prompts = model_of(config), [[1, 5, 3], [2, 4]]
    away, how = in_file(params, tmp_path / "w"), {"max_new_tokens": 7, "stop_ids": []}
    assert greedy(model, away, prompts, **how) == greedy(model, read_again(params, tmp_path / "w"), prompts, **how)


def test_outside_of_blocks_they_are_what_they_stand_for_and_are_never_written(tmp_path: Path) -> None:
    weights = random_params(SMALL)
    params = quantized(weights, NF4())
    away = in_file(params, tmp_path / "w")
    name = "model.layers.1.mlp.down_proj.weight"
    params = read_again(params, tmp_path / "w")
    same(DORA.init(away, 0), DORA.init(params, 0))
    deltas = random_deltas(weights, DORA)
    same(*(merge_trainable(one, deltas, DORA, stored=weights).params for one in (away, params)))
    same(gather(away), params)
    dense = in_file(weights, tmp_path / "dense")[name]
    assert isinstance(dense, OffloadedTensor)
    same(dense.to(torch.float64, copy=True), weights[name].double())
    with pytest.raises(TypeError, match="writes an offloaded weight, expected none to do so"):
        dense.zero_()


def test_a_file_that_another_one_replaces_is_read_on(tmp_path: Path) -> None:
    weights, other = random_params(SMALL), random_params(SMALL, 3)
    away = in_file(weights, tmp_path / "w")
    in_file(other, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "w")
    same(gather(away), weights)


class Journey:
    """Carrier whose copies arrive when they are waited for, and what is on its way or alive at any time."""

    def __init__(self) -> None:
        self.fetched: list[weakref.ref] = []
        self.begun = self.most = 0

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        self.begun += 1
        self.most = max(self.most, self.begun)
        return x

    def end(self, x: torch.Tensor) -> torch.Tensor:
        self.begun -= 1
        self.fetched.append(weakref.ref(x))
        return x

    def alive(self) -> int:
        return sum(one() is not None for one in self.fetched)


@pytest.mark.parametrize("n_remat", [0, 1, 4])
def test_a_block_is_fetched_ahead_and_never_outlives_its_turn(tmp_path: Path, n_remat: int) -> None:
    """In the forward and in the backward: at most the block that computes is there, and the one after it on its way."""
    config = type(SMALL)(n_layers=4, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17)
    weights, journey, seen = random_params(config), Journey(), []
    away = in_file(weights, tmp_path / "w", by=Carrier(journey.begin, journey.end))
    of_block = sum(name.startswith("model.layers.0.") and w.ndim > 1 for name, w in weights.items())

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((journey.alive(), journey.begun))
        return block(*args, **kwargs)

    model = model_of(config)._replace(n_remat=n_remat, block=watched)
    step = sft_step(model, RULE, AdamW(lr=0.01))
    step.update(away, step.init(random_deltas(weights, RULE)), random_batch(config, 2, 11))
    assert {alive for alive, _ in seen} == {of_block}
    ahead = [of_block] * 3 + [0]
    again = [of_block] * (n_remat - 1) + [0] if n_remat else []
    assert [begun for _, begun in seen] == [*ahead, *again]
    assert journey.most == of_block
    assert journey.begun == journey.alive() == 0
    # every block once for the forward and once for the backward
    assert len(journey.fetched) == 2 * 4 * of_block


@pytest.mark.parametrize("n_remat", [0, 2])
def test_weights_come_one_block_ahead_in_the_backward_and_in_every_step_of_an_answer(tmp_path: Path, n_remat: int) -> None:
    config = type(SMALL)(n_layers=3, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17)
    weights, journey, order = random_params(config), Journey(), []
    away = in_file(weights, tmp_path / "w", by=Carrier(journey.begin, journey.end))
    numbers = {id(w.source): int(name.split(".")[2]) for name, w in away.items() if isinstance(w, OffloadedTensor)}
    begin_fetch, of_block = gather_module.begin_fetch, len(numbers) // 3

    def noted(leaves: Any) -> Any:
        order.append((numbers[id(leaves[0].source)], journey.alive() // of_block))
        return begin_fetch(leaves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_module, "begin_fetch", noted)
        step = sft_step(model_of(config)._replace(n_remat=n_remat), RULE, AdamW(lr=0.01))
        step.update(away, step.init(random_deltas(weights, RULE)), random_batch(config, 2, 11))
        # (block, how many are there when it begins to come)
        assert order == [(0, 0), (1, 1), (2, 1), (2, 0), (1, 1), (0, 1)]
        order.clear()
        greedy(model_of(config), away, [[1, 2]], max_new_tokens=3, stop_ids=[])
        assert order == [(0, 0), (1, 1), (2, 1)] * 3


@needs_cuda
@pytest.mark.parametrize("n_remat", [0, 8])
def test_on_cuda_steps_are_those_of_weights_that_stay_and_take_less_memory(n_remat: int) -> None:
    from minitune.hardware import pinned
    from minitune.sharding.offloaded import carrier

    config = type(SMALL)(n_layers=8, n_heads=8, n_kv_heads=4, d_model=512, d_head=64, d_ff=2048, vocab_size=331)
    device = torch.device("cuda", torch.cuda.current_device())
    weights, one = random_params(config, dtype=torch.bfloat16), carrier(device)
    deltas = tree.map(lambda x: 0.01 * x.to(device, torch.float32), random_deltas(weights, RULE))
    here = {name: w.to(device) for name, w in weights.items()}
    away = {
        name: OffloadedTensor(pinned(w), device, w.dtype, one) if ".layers." in name and w.ndim > 1 else w.to(device)
        for name, w in weights.items()
    }
    model, batches = model_of(config)._replace(n_remat=n_remat), [random_batch(config, 4, 257, seed) for seed in range(4)]
    wanted = stepped(here, deltas, RULE, model, batches)
    del here
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    same(stepped(away, deltas, RULE, model, batches), wanted)
    of_blocks = sum(w.numel() * w.element_size() for w in away.values() if isinstance(w, OffloadedTensor))
    assert before < of_blocks
