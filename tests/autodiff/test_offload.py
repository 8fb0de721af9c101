"""Block inputs that wait elsewhere for the backward: the order of their travels, what lives meanwhile, and the same gradients.

On the CPU with a mover that copies as late as it may: what is used before it was waited for is NaN, and a source that is gone by
then is an error. On a CUDA device with the real one.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitune import steps, tree
from minitune.algorithms import sweep
from minitune.algorithms.load_balancing import balanced
from minitune.algorithms.objective import split_trainable
from minitune.algorithms.preference import preference
from minitune.algorithms.supervised import sft
from minitune.autodiff import offload
from minitune.autodiff.value_and_grad import detached_leaves, per_example, value_and_grad
from minitune.lora import Lora
from minitune.losses.preference import Dpo
from minitune.losses.token import CrossEntropy
from minitune.models import FAMILIES, Model
from minitune.models.experts import Experts
from minitune.models.families import llama
from minitune.optim.adamw import AdamW
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.quant.schemes import base_weight
from minitune.types import Batch, Mean, Pairs, TrainState
from support.models import SMALL, random_batch, random_params
from support.programs import LORA, TRAIN, run
from support.scripts import run_script

SIZES = {"n_layers": 5, "n_heads": 2, "n_kv_heads": 1, "d_model": 14, "d_head": 6, "d_ff": 13, "vocab_size": 17}
CONFIG = llama.Config(**SIZES, tie_embeddings=False)
RULE = Lora(3, 8.0, ("*_proj.weight",))
UPPER = Lora(3, 8.0, ("model.layers.[24].*_proj.weight",))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Refs = list[weakref.ref]


class Late:
    """A mover that copies when it is waited for, and what it saw."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.sources: Refs = []  # memory that was sent away,
        self.copies: Refs = []  # that lies away,
        self.returned: Refs = []  # and that was fetched
        self.mover = offload.Mover(self.send, self.fetch, self.wait)
        self.most = 0  # that was returned and alive at once

    def send(self, x: Tensor) -> dict[str, Any]:
        self.sources.append(memory(x))
        return self.begun("send", len(self.copies), weakref.ref(x), x, self.copies)

    def fetch(self, away: dict[str, Any]) -> dict[str, Any]:
        assert away["done"], "fetched before it was sent"
        coming = self.begun("fetch", away["place"], lambda: away["to"], away["to"], self.returned)
        self.most = max(self.most, alive(self.returned))
        return coming

    def begun(self, what: str, place: int, source: Callable[[], Tensor | None], x: Tensor, kept: Refs) -> dict[str, Any]:
        to = torch.full_like(x, torch.nan)
        kept.append(memory(to))
        self.events.append((what, place))
        return {"what": what, "place": place, "source": source, "to": to, "done": False}

    def wait(self, copy: dict[str, Any]) -> Tensor:
        self.events.append((f"wait {copy['what']}", copy["place"]))
        source = copy["source"]()
        assert source is not None, "let go before it was sent"
        copy["to"].copy_(source)
        copy["done"] = True
        return copy["to"]


def memory(x: Tensor) -> weakref.ref:
    return weakref.ref(x.untyped_storage())


def alive(refs: Refs) -> int:
    return sum(ref() is not None for ref in refs)


def both(model: Model, late: Late) -> tuple[Model, Model]:
    """The model whose inputs stay, and the one whose inputs are away."""
    on_device = model._replace(n_remat=model.config.n_layers)
    return on_device, on_device._replace(remat=offload.remat(late.mover))


def same(ours: Any, theirs: Any) -> None:
    """To the last bit."""
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), ours, theirs)


def gradient(objective: Any, trainable: Any, params: Any, batch: Any) -> Any:
    return value_and_grad(lambda leaves: objective(leaves, params, batch), has_aux=True)(trainable)


def watched(events: list[tuple[str, int]], first: str, note: Callable[[Tensor], None] = lambda x: None) -> Callable[..., Any]:
    """A wrap that notes each block as it runs; first: the name of a weight by which a block is known."""
    layers: dict[int, int] = {}

    def wrap(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(w: Any, x: Tensor, *rest: Any) -> Tensor:
            events.append(("run", layers.setdefault(base_weight(w[first]).data_ptr(), len(layers))))
            note(x)
            return block(w, x, *rest)

        return run

    return wrap


def test_an_input_leaves_during_its_block_and_returns_during_the_backward_of_the_one_behind() -> None:
    late, params, batch = Late(), random_params(CONFIG), random_batch(CONFIG, 2, 11)
    model = both(Model(llama.FAMILY, CONFIG, watched(late.events, "mlp.up_proj.weight")), late)[1]
    gradient(sft(model, RULE), RULE.init(params, 0), params, batch)
    forward = [("send", 0), ("run", 0)]
    for i in range(1, 5):
        forward += [("wait send", i - 1), ("send", i), ("run", i)]
    backward = [("wait send", 4), ("fetch", 3), ("run", 4)]  # the last one is still here
    for i in range(3, 0, -1):
        backward += [("wait fetch", i), ("fetch", i - 1), ("run", i)]
    assert late.events == [*forward, *backward, ("wait fetch", 0), ("run", 0)]


def test_on_the_device_live_two_inputs_in_the_forward_and_two_in_the_backward() -> None:
    params, batch, most = random_params(CONFIG), random_batch(CONFIG, 2, 11), {}
    for name in ("here", "away"):
        late, given, counts = Late(), [], []

        def note(x: Tensor, given: Refs = given, counts: list[int] = counts) -> None:
            given.append(memory(x))
            counts.append(alive(given))

        wrap = watched([], "mlp.up_proj.weight", note)
        model = dict(zip(("here", "away"), both(Model(llama.FAMILY, CONFIG, wrap), late), strict=True))[name]
        gradient(sft(model, RULE), RULE.init(params, 0), params, batch)
        assert len(counts) == 10
        most[name] = max(counts[:5]), max(counts[5:])
        if name == "away":
            assert late.most == 2
            assert len(late.returned) == 4
            assert alive(late.sources + late.copies + late.returned) == 0
    assert most["here"][0] == 5
    assert most["away"] <= (2, 2)


@pytest.mark.parametrize("rule", [RULE, UPPER, None], ids=["lora", "upper layers", "full"])
def test_steps_are_the_same_to_the_last_bit(rule: Lora | None) -> None:
    params, late, ends = random_params(CONFIG), Late(), []
    optimizer = chain(ClipByGlobalNorm(0.3), AdamW(lr=1e-2))
    frozen, trainable = (params, rule.init(params, 1)) if rule else split_trainable(params, ("*",))
    for model in both(Model(llama.FAMILY, CONFIG), late):
        objective = sft(model, rule)
        step, evaluate = steps.train_step(objective, optimizer, micro_batch=2), steps.eval_step(objective)
        state, history = (trainable, optimizer.init(trainable)), []
        for i in range(2):
            state, metrics = step.update(frozen, TrainState(*state), random_batch(CONFIG, 3, 11 + i, seed=i))
            n_events = len(late.events)
            history.append((metrics, evaluate(state[0], frozen, random_batch(CONFIG, 1, 9, seed=9))))
            assert len(late.events) == n_events  # nothing moves where no gradient is wanted
        ends.append((list(state), history))
    same(ends[0], ends[1])
    n_blocks = 3 if rule is UPPER else 5  # below the first delta nothing is computed again
    assert sum(what == "send" for what, _ in late.events) == 2 * 2 * n_blocks
    assert sum(what == "fetch" for what, _ in late.events) == 2 * 2 * (n_blocks - 1)
    assert alive(late.sources + late.copies + late.returned) == 0


def test_preferences_and_two_forwards_before_one_backward_are_the_same_to_the_last_bit() -> None:
    params, late = random_params(CONFIG), Late()
    rows = [random_batch(CONFIG, 3, n, seed=n) for n in (7, 12)]
    deltas = tree.map(lambda x: x + 0.01, RULE.init(params, 0))
    gradients = []
    for model in both(Model(llama.FAMILY, CONFIG), late):
        one = sft(model, RULE)

        def twice(leaves: Any, params: Any, batches: Any, one: Any = one) -> Any:
            means = [one(leaves, params, batch)[0] for batch in batches]
            return Mean(means[0].total * means[1].total, means[0].weight), {}

        dpo = preference(model, RULE, Dpo(), RULE.init(params, 1))
        gradients.append((gradient(dpo, deltas, params, Pairs(*rows)), gradient(twice, deltas, params, rows)))
    same(gradients[0], gradients[1])
    assert sum(what == "send" for what, _ in late.events) == 3 * 5
    assert alive(late.sources + late.copies + late.returned) == 0


def test_a_sweep_and_routers_are_the_same_to_the_last_bit() -> None:
    params, late, rules = random_params(CONFIG), Late(), [Lora(2, 4.0, RULE.targets), Lora(3, 9.0, RULE.targets)]
    deltas = sweep.stack([rule.init(params, i) for i, rule in enumerate(rules)])
    batch = tree.map(lambda x: x.unflatten(0, (2, 3)), random_batch(CONFIG, 6, 9))
    optimizers, results = [AdamW(lr=1e-2), AdamW(lr=1e-3)], []
    for model in both(Model(llama.FAMILY, CONFIG), late):
        step = sweep.sweep_step(model, CrossEntropy(), rules, optimizers, micro_batch=2)
        states = [o.init(d) for o, d in zip(optimizers, sweep.unstack(deltas, 2), strict=True)]
        results.append(step.update(params, TrainState(deltas, states), batch))
    same(results[0], results[1])
    assert len(late.returned) == 2 * 4

    experts = Experts(n_experts=4, n_active=2, d_ff=7, names="qwen", layers=(True, False))
    config = FAMILIES["qwen3_moe"].config(**SIZES, experts=experts)
    params, batch, results = random_params(config), random_batch(config, 2, 9), []
    for model in both(Model(FAMILIES["qwen3_moe"], config), late):
        objective = balanced(partial(sft, loss=CrossEntropy(), lora=None), model, 0.1)
        results.append(gradient(objective, params, params, batch))
    same(results[0], results[1])
    assert alive(late.sources + late.copies + late.returned) == 0


def test_under_a_transform_inputs_stay_and_gradients_are_the_same() -> None:
    params, late = random_params(SMALL), Late()
    deltas, batch, gradients = RULE.init(params, 0), random_batch(SMALL, 3, 9), []
    for model in both(Model(llama.FAMILY, SMALL), late):
        objective = sft(model, RULE)

        def of_row(leaves: Any, row: Any, objective: Any = objective) -> Mean:
            return objective(leaves, params, tree.map(lambda x: x[None], row))[0]

        gradients.append(
            (
                per_example(of_row, chunk=2)(deltas, batch),
                torch.func.grad(lambda leaves, objective=objective: objective(leaves, params, batch)[0].total)(deltas),
            )
        )
    same(gradients[0], gradients[1])
    assert not late.events


def test_a_gradient_can_be_taken_twice_and_by_halves_but_not_of_itself() -> None:
    late, params, batch = Late(), random_params(CONFIG), random_batch(CONFIG, 2, 11)
    on_device, model = both(Model(llama.FAMILY, CONFIG), late)
    adapted = RULE.apply(params, detached_leaves(RULE.init(params, 0)))
    upper, leaves = (adapted[f"model.layers.{i}.mlp.down_proj.weight"].b for i in (3, 0))
    theirs = on_device.hidden(adapted, batch).exp().sum()
    ours = model.hidden(adapted, batch).exp().sum()
    for wanted in ([upper], [leaves, upper], [leaves], [upper], [leaves]):
        same(*(list(torch.autograd.grad(y, wanted, retain_graph=True)) for y in (ours, theirs)))
    assert late.most <= 3  # that of a backward which stopped halfway, too
    (once,) = torch.autograd.grad(ours, [leaves], create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        once.sum().backward()
    torch.autograd.grad(ours, [leaves])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ours, [leaves])


def failing(fault: list[int]) -> Callable[..., Any]:
    """A wrap whose blocks count fault[0] down and fail at zero."""

    def wrap(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            fault[0] -= 1
            if fault[0] == 0:
                raise ArithmeticError("a block failed")
            return block(*args)

        return run

    return wrap


@pytest.mark.parametrize("at", [1, 3, 5, 6, 8, 10])
def test_what_fails_or_is_never_differentiated_leaves_nothing_behind(at: int) -> None:
    late, params, batch, fault = Late(), random_params(CONFIG), random_batch(CONFIG, 2, 11), [0]
    deltas = RULE.init(params, 0)
    on_device, model = both(Model(llama.FAMILY, CONFIG, failing(fault)), late)
    wanted = gradient(sft(on_device, RULE), deltas, params, batch)
    states = model.hidden(RULE.apply(params, detached_leaves(deltas)), batch)
    assert alive(late.sources) == 1
    assert alive(late.copies) == 5
    del states
    assert alive(late.sources + late.copies + late.returned) == 0
    fault[0] = at
    objective = sft(model, RULE)
    try:
        gradient(objective, deltas, params, batch)
        raise AssertionError("expected a failure")
    except ArithmeticError:
        pass
    assert alive(late.sources + late.copies + late.returned) == 0
    same(gradient(objective, deltas, params, batch), wanted)
    assert alive(late.sources + late.copies + late.returned) == 0


def test_a_stage_on_a_cuda_device_sends_its_inputs_away(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def losses(name: str, remat: str) -> list[float]:
        run(tmp_path, tiny, LORA + TRAIN + f"compiled = false\nremat = {remat}\n", name=name)
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    late, asked = Late(), []
    wanted = losses("here", "true")
    monkeypatch.setattr("minitune.programs.stages.training_model.device_of", lambda *_: torch.device("cuda", 3))
    monkeypatch.setattr(offload, "side_stream", lambda device: asked.append(device) or late.mover)
    assert losses("away", '"host"') == wanted
    assert len(wanted) == 4
    assert asked == [torch.device("cuda", 3)]
    assert len(late.sources) == 5 * 2  # of four steps, and of the gradients that the run looks at before
    assert len(late.returned) == 5 * 1
    assert alive(late.sources + late.copies + late.returned) == 0


def test_compiled_blocks_are_the_same_graphs_with_the_same_result() -> None:
    assert run_script("offload_compiled") == "True 5\n"


def test_the_side_stream_waits_for_the_computation_and_it_for_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            events.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            events.append(f"{self.name} marks {len(events)}")
            return events[-1]

    class Sent(Tensor):
        def to(self, *args: Any, **how: Any) -> Tensor:
            events.append(f"to {args[0]} {how} on {current[-1].name}")
            return self

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    current = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    mover, x = offload.side_stream(torch.device("cuda", 0)), torch.ones(3).as_subclass(Sent)
    away = mover.send(x)
    mover.wait(away)
    assert mover.wait(mover.fetch(away)) is x
    assert events == [
        *("side waits for main", "to cpu {'non_blocking': True} on side", "side marks 2", "main waits for side marks 2"),
        *("side waits for main", "to cuda:0 {'non_blocking': True} on side", "side marks 6", "main waits for side marks 6"),
    ]


def on_cuda(n_layers: int, rows: int, length: int) -> tuple[llama.Config, Any, Any, Batch]:
    """(config, params, deltas, batch) of a size at which copies and blocks overlap."""
    config = llama.Config(
        n_layers=n_layers, n_heads=8, n_kv_heads=4, d_model=512, d_head=64, d_ff=1024, vocab_size=331, tie_embeddings=False
    )
    params, batch = random_params(config), random_batch(config, rows, length)
    return config, *tree.map(lambda x: x.cuda(), (params, RULE.init(params, 0), batch))


@needs_cuda
def test_on_cuda_gradients_are_those_of_inputs_that_stay() -> None:
    config, params, deltas, batch = on_cuda(7, 4, 1031)
    on_device = Model(llama.FAMILY, config, n_remat=7)
    away = on_device._replace(remat=offload.remat(offload.side_stream(torch.device("cuda"))))
    wanted = gradient(sft(on_device, RULE), deltas, params, batch)
    for _ in range(5):
        same(gradient(sft(away, RULE), deltas, params, batch), wanted)


@needs_cuda
def test_on_cuda_what_is_sent_lies_in_pinned_memory_and_returns_to_the_last_bit() -> None:
    mover, x = offload.side_stream(torch.device("cuda")), torch.randn(1031, 517, device="cuda").bfloat16()
    sent = mover.send(x)
    host = mover.wait(sent)
    assert host.device.type == "cpu"
    assert host.is_pinned()
    same(mover.wait(mover.fetch(sent)), x)


@needs_cuda
def test_on_cuda_the_peak_is_lower_by_the_inputs_of_most_blocks() -> None:
    config, params, deltas, batch = on_cuda(16, 4, 1024)
    on_device, peaks = Model(llama.FAMILY, config, n_remat=16), []
    for model in (on_device, on_device._replace(remat=offload.remat(offload.side_stream(torch.device("cuda"))))):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            gradient(sft(model, RULE), deltas, params, batch)
        peaks.append(torch.cuda.max_memory_allocated())
    one = batch.tokens.numel() * config.d_model * 4  # bytes of a block's input
    assert peaks[0] - peaks[1] > 11 * one
