"""Work on an accelerator: no step waits for it, nothing lies on the wrong device, and nothing asks for what it lacks.

A simulated device shows it on any machine. Tests that compare figures need a real accelerator.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import checkpoint, hardware, steps, tree
from minitune.algorithms import dp_sgd, shared_state, sweep, unpaired
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.distillation import distillation as algorithms_distillation
from minitune.algorithms.load_balancing import balanced
from minitune.algorithms.preference import preference as algorithms_preference
from minitune.algorithms.supervised import sft
from minitune.autodiff import chunked
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.inference.generate import stream
from minitune.inference.sampling import Sampling
from minitune.inference.score import _read
from minitune.lora import Lora
from minitune.losses.distillation import ForwardKL
from minitune.losses.preference import Dpo, Orpo
from minitune.losses.token import CrossEntropy, cross_entropy
from minitune.losses.unpaired import Kto
from minitune.models import Model
from minitune.models.families import gemma, llama
from minitune.models.rope_scaling import Dynamic, LongRope
from minitune.nn import head as nn_head
from minitune.nn.head import token_losses
from minitune.optim import eight_bit, muon
from minitune.optim.adamw import AdamW
from minitune.optim.schedules import Cosine, ScaleBySchedule
from minitune.optim.sgd import SGD
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.programs.stages import training_loop
from minitune.types import Batch, Pairs, TeacherBatch, TrainState, UnpairedBatch
from support.device import META, WITH_FLOAT64, WITHOUT_FLOAT64, WaitError, on_device, simulated
from support.experts import small_experts
from support.models import SMALL, family_of, random_batch, random_params
from support.programs import LORA, TRAIN, run, start

CONFIG = msgspec.structs.replace(SMALL, n_layers=1)
MODEL = Model(llama.FAMILY, CONFIG)
RULE = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",))
GENERATOR = torch.Generator().manual_seed(0)
ROWS = random_batch(CONFIG, 4, 9)
PAIRS = Pairs(ROWS, random_batch(CONFIG, 4, 7, seed=1))
UNPAIRED = UnpairedBatch(ROWS, PAIRS.rejected, torch.tensor([True, False, False, True]))
TOP_IDS = torch.randint(0, 17, (4, 9, 3), generator=GENERATOR)
TOPS = TeacherBatch(ROWS, TOP_IDS, torch.randn(4, 9, 3, generator=GENERATOR).log_softmax(-1))
LOGPS = torch.randn(4, 2, generator=GENERATOR)


def kinds(params: Any, trainable_rule: Lora | None = RULE) -> dict[str, tuple[Any, Any]]:
    """(objective, batch on the host) of every kind of step."""
    preference = partial(algorithms_preference, MODEL, trainable_rule)
    unpaired_preference = partial(unpaired.unpaired_preference, MODEL, trainable_rule)
    distillation = partial(algorithms_distillation, MODEL, trainable_rule, ForwardKL())
    return {
        "sft": (sft(MODEL, trainable_rule), ROWS),
        "dpo": (preference(Dpo(), reference={}), PAIRS),
        "dpo with a cached reference": (preference(Dpo(), reference=None), PAIRS._replace(reference=LOGPS)),
        "orpo": (preference(Orpo(), reference=None), PAIRS),
        "kto": (unpaired_preference(Kto(), reference={}), UNPAIRED),
        "kto with a cached reference": (unpaired_preference(Kto(), reference=None), UNPAIRED._replace(reference=LOGPS)),
        "kd": (distillation(Teacher(MODEL, params)), ROWS),
        "kd with a cached teacher": (distillation(None), TOPS),
    }


KINDS = list(kinds({}))
CHAIN = chain(ClipByGlobalNorm(1.0), AdamW(lr=0.1), ScaleBySchedule(Cosine(), 10))
OPTIMIZERS = {
    "sgd": SGD(lr=0.1),
    "adamw": CHAIN,
    "adamw8bit": eight_bit.AdamW8bit(lr=0.1),
    "muon": muon.Muon(lr=0.1),
}


def trees(whole: bool = False) -> tuple[Any, Any]:
    """(params, trainable) on the simulated device."""
    params = random_params(CONFIG)
    return on_device((params, dict(params) if whole else RULE.init(params, 0)))


def gradient(objective: Any, params: Any, trainable: Any, batch: Any) -> Any:
    return value_and_grad(lambda leaves: objective(leaves, params, batch), has_aux=True)(trainable)


def skip_update(optimizer: Any, grads: Any, state: Any, params: Any, **how: Any) -> tuple[Any, Any]:
    """In place of an optimizer, where a test is about everything before it."""
    return params, state


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_its_objective_or_metrics(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "apply_gradients", skip_update)
    with simulated(WITHOUT_FLOAT64):
        params, deltas = trees()
        objective, batch = kinds(params)[kind]
        (new, _), metrics = steps.train_step(objective, CHAIN, micro_batch=3).update(params, TrainState(deltas, ()), batch)
        training_loop.reading(metrics)
        assert {x.device for x in tree.leaves((new, metrics))} == {META}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_no_step_waits_where_the_head_trains(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "apply_gradients", skip_update)
    with simulated(WITHOUT_FLOAT64):
        params, trainable = trees(whole=True)
        objective, batch = kinds(params, None)[kind]
        _, metrics = steps.train_step(objective, CHAIN, micro_batch=4).update(params, TrainState(trainable, ()), batch)
        assert {x.device for x in tree.leaves(metrics)} == {META}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_waits_for_its_optimizer(name: str, donate: bool) -> None:
    optimizer = OPTIMIZERS[name]
    with simulated(WITHOUT_FLOAT64):
        params, deltas = trees()
        objective, batch = kinds(params)["sft"]
        state = on_device(optimizer.init(RULE.init(random_params(CONFIG), 0)))
        step = steps.train_step(objective, optimizer, micro_batch=4, donate=donate)
        (new, _), _ = step.update(params, TrainState(deltas, state), batch)
        assert {x.device for x in tree.leaves(new)} == {META}


def test_a_private_step_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "apply_gradients", skip_update)
    with simulated(WITHOUT_FLOAT64):
        params, deltas = trees()
        privacy = dp_sgd.Privacy(max_norm=1.0, noise=0.5, seed=0, chunk=2)
        step = dp_sgd.private_step(sft(MODEL, RULE), CHAIN, privacy)
        state = dp_sgd.PrivateState(torch.zeros((), dtype=torch.int64), ())
        (_, after), metrics = step.update(params, TrainState(deltas, state), ROWS)
        assert {x.device for x in tree.leaves(metrics)} == {META}
    assert int(after.step) == 1


def test_a_sweep_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "apply_gradients_each", lambda *args, **how: None)
    own = Batch(*(torch.stack([x, x]) for x in ROWS))
    deltas = RULE.init(random_params(CONFIG), 0)
    with simulated(WITHOUT_FLOAT64):
        params, stacked = on_device((random_params(CONFIG), sweep.stack([deltas, deltas])))
        step = sweep.sweep_step(MODEL, CrossEntropy(), [RULE, RULE], [CHAIN, CHAIN], micro_batch=2, donate=True)
        _, metrics = step.update(params, TrainState(stacked, [(), ()]), own)
        assert {x.device for x in tree.leaves(metrics)} == {META}


SIZES: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_model": 12,
    "d_head": 6,
    "vocab_size": 17,
    "max_positions": 64,
}
CONFIGS = {
    "dynamic RoPE": msgspec.structs.replace(SMALL, rope_scaling=Dynamic(2.0)),
    "longrope": msgspec.structs.replace(SMALL, rope_scaling=LongRope((1.0, 1.5, 2.0), (2.0, 3.0, 4.0), 5)),
    "gemma": gemma.Config(**SIZES, d_ff=13),
    **{name: small_experts(name) for name in ("mixtral", "llama4_text", "gpt_oss")},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_family_waits_or_makes_a_tensor_on_the_host(name: str) -> None:
    config = CONFIGS[name]
    model, rule = Model(family_of(config), config, n_remat=1), Lora(2, 4.0, ("*.self_attn.*_proj.weight",))
    params = random_params(config)
    objective = sft(model, rule)
    if getattr(config, "experts", None) is not None:
        objective = balanced(lambda model: sft(model, rule), model, 0.1)
    with simulated(WITHOUT_FLOAT64):
        weights, deltas = on_device((params, rule.init(params, 0)))
        _, grads = gradient(objective, weights, deltas, ROWS)
        assert {x.device for x in tree.leaves(grads)} == {META}


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)]
)
def test_decoding_and_scoring_stay_on_the_device_and_need_no_float64(sampling: Sampling) -> None:
    with simulated(WITHOUT_FLOAT64, waits=True):
        params, deltas = trees()
        how = {"sampling": sampling, "row_seeds": [1, 2], "max_new_tokens": 3}
        tokens = list(stream(MODEL, RULE.apply(params, deltas), [[1, 2, 3], [4]], **how))
        assert [(x.device, x.shape) for x in tokens] == [(META, (2,))] * 3
        logps, greedy = _read(MODEL, RULE.apply(params, deltas), [[1, 2, 3], [4, 5]], [(0, 2), (1, 1)], [3, 7])
        assert logps.shape == greedy.shape == (2,)


def test_a_batch_on_the_device_is_waited_for_and_the_simulation_sees_it() -> None:
    with simulated():
        params, deltas = trees()
        objective, _ = kinds(params)["sft"]
        with pytest.raises(WaitError, match="nonzero"):
            gradient(objective, params, deltas, on_device(ROWS))


x_on_host = torch.ones(3)
FAULTS = {
    "a value read": lambda x: x.sum().item(),
    "a decision": lambda x: bool(x.sum() > 0),
    "rows by a mask": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.cpu(),
    "a copy to the device": lambda x: x_on_host.to(META),
    "values for the device": lambda x: torch.tensor([1.0], device=META),
    "a tensor of the host": lambda x: x + x_on_host,
    "an index of the host": lambda x: x[torch.tensor([0, 2])],
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_simulated_device_refuses(name: str) -> None:
    with simulated(WITHOUT_FLOAT64):
        x = on_device(x_on_host)
        with pytest.raises(WaitError):
            FAULTS[name](x)


def test_the_simulated_device_takes_what_waits_for_nothing() -> None:
    with simulated(WITH_FLOAT64):
        x = on_device(x_on_host)
        assert hardware.to_device(x_on_host, META).device == META
        assert x[hardware.to_device(torch.tensor([0, 2]), META)].shape == (2,)
        assert (x * torch.tensor(2.0)).device == META  # a number of the host goes along with the operator
        assert x.double().dtype == torch.float64


@pytest.mark.parametrize("summed", [False, True])
def test_a_head_that_trains_has_its_gradient_without_a_look_at_the_cotangents(
    summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    targets, mask = torch.randint(0, 11, (2, 5)), torch.rand(2, 5) < 0.7
    monkeypatch.setattr(nn_head, "head_chunk", lambda head, trains=False: 3)

    def grads(weights: torch.Tensor) -> Any:
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        nats = token_losses(cross_entropy, leaves[0], targets, mask, leaves[1], summed=summed)
        return torch.autograd.grad((weights * nats).sum(), leaves)

    ones, others = torch.ones(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    wanted = [grads(ones), grads(others)]
    monkeypatch.setattr(chunked, "is_accelerator", lambda device: True)
    torch.testing.assert_close(grads(ones), wanted[0])
    if summed:
        assert all(x.isnan().any() for x in grads(others))
    else:
        torch.testing.assert_close(grads(others), wanted[1])


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: x for key, x in row.items() if key not in ("tokens_per_second", "mem_bytes")} for row in rows]


def test_rows_that_are_read_a_step_late_are_the_same_rows(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = LORA + TRAIN.replace("steps = 4", "steps = 7").replace("save_every = 2", "save_every = 3")
    stages += 'compiled = false\nevaluate = { data = "heldout", every = 5 }\n'
    run(tmp_path, tiny, stages, name="at_once")
    order: list[str] = []
    monkeypatch.setattr(hardware, "is_accelerator", lambda device: True)
    monkeypatch.setattr(hardware, "peak_bytes", lambda device: 1)
    begin = training_loop.reading

    def reading(metrics: Any) -> Any:
        order.append("queued")
        read = begin(metrics)
        return lambda: (order.append("read"), read())[1]

    monkeypatch.setattr(training_loop, "reading", reading)
    run(tmp_path, tiny, stages, name="late")
    assert lines(tmp_path / "late") == lines(tmp_path / "at_once")
    queued, both = ["queued"], ["queued", "read"]
    # all is read before step 3 and 6 are saved, step 5 is evaluated, and step 7 is the last
    assert order == [*queued, *both, *both, "read", *queued, *both, "read", *both, *both]
    states = (checkpoint.list_states(tmp_path / name / "checkpoints/train")[-1] for name in ("late", "at_once"))
    late, at_once = (checkpoint.load_tensors(state / "state.safetensors") for state in states)
    assert all(torch.equal(late[name], at_once[name]) for name in at_once)


@pytest.mark.parametrize("accelerator", [None, "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(
    accelerator: str | None,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda: accelerator)
    for verb in ((), ("check",)):
        assert start(tmp_path, tiny, LORA + TRAIN, "model.device=xpu", verb=verb) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        here = (
            "no accelerator, expected 'auto' or 'cpu'"
            if accelerator is None
            else "an accelerator of type mps, expected 'auto', 'cpu' or 'mps'"
        )
        assert f"loading: [model] device = 'xpu', but torch finds {here} on this machine" in error


needs_accelerator = pytest.mark.skipif(hardware.accelerator() is None, reason="needs an accelerator, and torch finds none")


@needs_accelerator
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_the_accelerator_is_the_step_on_the_cpu(kind: str, whole: bool) -> None:
    params = random_params(CONFIG)
    trainable = dict(params) if whole else RULE.init(params, 0)
    results = []
    for device in ("cpu", str(hardware.accelerator())):
        weights, leaves = tree.map(lambda x, to=device: x.to(to), (params, trainable))
        objective, batch = kinds(weights, None if whole else RULE)[kind]
        step = steps.train_step(objective, SGD(lr=0.1), micro_batch=3)
        (new, _), metrics = step.update(weights, step.init(leaves), batch)
        results.append(tree.map(lambda x: x.cpu(), (new, metrics)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
