"""The plan verb: whether each training stage of a program fits this machine, and what a step of it is made of."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import costs, models, objectives, program, quant, stages, tree, world
from minitune.costs import Step
from minitune.grad import fresh
from minitune.losses import Kto, PairLoss
from minitune.models import memory
from minitune.stages import sweeping
from minitune.stages.train import Train
from minitune.types import InputError, Params, Trainable
from minitune.world import Draft, ModelSource

MIB = 2**20


class Planned(NamedTuple):
    """A training stage, its step, what that has in memory at its fullest moment, and its floating-point operations."""

    stage: Train
    step: Step
    parts: costs.Parts
    flops_per_token: float

    @property
    def n_bytes(self) -> int:
        """The floor of the step's memory."""
        return sum(self.parts.values())


class _Made(NamedTuple):
    """What the stages so far have made of the model."""

    draft: Draft
    source: ModelSource
    schemes: dict[str, quant.Scheme] = {}
    narrow: frozenset[str] = frozenset()  # weights that train whole in bfloat16
    rounded: frozenset[str] = frozenset()


def show(file: Path, overrides: Sequence[str], console: Console | None = None) -> int:
    """Print what each training stage of a program needs and whether it fits; returns the exit code. No weight is read.

    InputError for what is wrong with the program, and for one that trains nothing.
    """
    found = list(planned(program.load(file, overrides)))
    if not found:
        raise InputError(f"plan: {file} has no train stage, expected one; the memory of other stages is that of their weights")
    screen = console or Console()
    screen.print(_table(found))
    for one in found:
        for line in _verdict(one):
            screen.print(Text(line), soft_wrap=True)
    return 0


def planned(asked: program.Program) -> Iterator[Planned]:
    """Every training stage of a program with its costs, in order; InputError for what would stop the program there."""
    nothing = Draft(asked.data, models.Model(models.FAMILIES["llama"], None), {})
    made = _Made(world.drafted(asked.model, nothing), asked.model)
    for stage in asked.stage:
        before, made = made.draft, made._replace(draft=stage.check(made.draft))
        if isinstance(stage, stages.Load):
            made = _Made(made.draft, stage.model)
        elif isinstance(stage, stages.Quantize):
            made = made._replace(schemes={**made.schemes, **stage.rule.plan(before.params)})
        elif isinstance(stage, stages.Full) and stage.dtype == "bfloat16":
            made = made._replace(narrow=made.narrow | made.draft.whole - before.whole)
        elif isinstance(stage, stages.Qat):
            made = made._replace(rounded=frozenset(stage.rule.plan(before.params)))
        elif isinstance(stage, Train):
            yield costed(stage, _step(stage, made))


def costed(stage: Train, step: Step) -> Planned:
    """The stage with the costs of its step."""
    return Planned(stage, step, costs.floor(step), costs.flops_per_token(step.model, step.trainable, step.n_tokens))


def _step(stage: Train, made: _Made) -> Step:
    draft, (device, _) = made.draft, world.compute_place(made.source)
    params, trainable = _weights(made), _trainable(made)
    optimizer = stage.optimizer_for(trainable, seed=0)
    beside: Trainable = trainable if isinstance(stage.loss, PairLoss | Kto) else {}  # as it was before the first step
    if stage.sweep is not None:
        n = len(sweeping.points(stage))
        trainable = beside = tree.map(lambda x: x.new_empty(n, *x.shape), trainable)  # and the best of each so far
    teacher = None
    if stage.teacher is not None:
        wise = _Made(world.drafted(stage.teacher, draft), stage.teacher)
        teacher = objectives.Teacher(wise.draft.model, _weights(wise))
    n_tokens, n_micro = draft.data[stage.data].seq_len, -(-stage.batch_size // (stage.micro_batch_size or stage.batch_size))
    where = device, stage.n_rows, n_tokens, n_micro, made.rounded & draft.whole
    step = Step(draft.model, params, trainable, draft.lora, optimizer, stage.loss, *where, beside, teacher)
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), (params, trainable))
        adapted = objectives.attach(like[0], fresh(like[1]), draft.lora)
        n_remat = stage.n_remat(draft.model, *adapted, n_tokens)
    return step._replace(model=draft.model._replace(n_remat=n_remat))


def _weights(made: _Made) -> Params:
    """The weights in the dtype of compute or as codes, on the meta device; equal ones are made once."""
    draft, (_, dtype) = made.draft, world.compute_place(made.source)
    known: dict[Any, Any] = {}
    params: dict[str, Any] = {}
    for name, w in draft.params.items():
        scheme = made.schemes.get(name) if name in draft.quantized else None
        if (w.shape, scheme) not in known:
            known[w.shape, scheme] = w.to(dtype) if scheme is None else quant.quantize(w, scheme)
        params[name] = known[w.shape, scheme]
    return params


def _trainable(made: _Made) -> Trainable:
    draft, whole = made.draft, {}
    for name in draft.whole:
        whole[name] = draft.params[name].to(torch.bfloat16 if name in made.narrow else torch.float32)
    if draft.lora is None:
        return whole
    with FakeTensorMode(allow_non_fake_inputs=True):  # draws nothing, and takes no memory
        deltas = draft.lora.init(draft.params, 0)
    return {**tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), deltas), **whole}


def _table(found: Sequence[Planned]) -> Table:
    table = Table(title="the fullest moment of a step [MiB]", title_justify="left")
    table.add_column("")
    for one in found:
        table.add_column(one.stage.label, justify="right")
    rows = {name: [one.parts[name] for one in found] for name in found[0].parts}
    for name, values in rows.items():
        if any(values):
            table.add_row(name, *(f"{value / MIB:,.1f}" for value in values))
    table.add_section()
    table.add_row("sum", *(f"{one.n_bytes / MIB:,.1f}" for one in found))
    table.add_section()
    table.add_row("GFLOP a token", *(f"{one.flops_per_token / 1e9:,.3g}" for one in found))
    table.add_row("TFLOP a step", *(f"{one.flops_per_token * _tokens(one) / 1e12:,.3g}" for one in found))
    return table


def _tokens(one: Planned) -> int:
    return one.step.n_rows * one.step.n_tokens * one.step.n_micro_batches


def _verdict(one: Planned) -> Iterator[str]:
    """Whether a stage fits, and what would make it fit."""
    step, there = one.step, _memory_bytes(one.step.device)
    rows = f"{step.n_rows} x {step.n_tokens:,} tokens at a time"
    if one.n_bytes <= there:
        yield f"{one.stage.label}: {rows}, {one.n_bytes / MIB:,.1f} of {there / MIB:,.0f} MiB of the {step.device.type}: fits"
        return
    yield f"{one.stage.label}: {rows}, {one.n_bytes / MIB:,.1f} MiB, but the {step.device.type} has {there / MIB:,.0f}: does not fit"
    for change, less in _smaller(one):
        n_bytes = sum(costs.floor(less).values())
        if n_bytes < one.n_bytes:
            yield f"  with {change}: {n_bytes / MIB:,.1f} MiB{', which fits' if n_bytes <= there else ''}"


def _smaller(one: Planned) -> Iterator[tuple[str, Step]]:
    """Changes to a program that need less memory, the mildest first, each with those before it."""
    step, label = one.step, one.stage.label
    n_rows = step.n_rows // min(one.stage.micro_batch_size or one.stage.batch_size, one.stage.batch_size)
    if step.n_rows > n_rows:
        step = step._replace(n_rows=n_rows, n_micro_batches=step.n_micro_batches * step.n_rows // n_rows)
        yield f"{label}.micro_batch_size=1", step
    if step.model.n_remat < step.model.config.n_layers:
        step = step._replace(model=step.model._replace(n_remat=step.model.config.n_layers))
        yield f"and {label}.remat=true" if step.n_rows < one.step.n_rows else f"{label}.remat=true", step
    dense = [name for name, w in step.params.items() if isinstance(w, Tensor) and name.endswith("_proj.weight") and w.ndim == 2]
    if step.lora is not None and dense:
        codes = {name: quant.quantize(step.params[name].float(), quant.NF4()) for name in dense if name not in step.trainable}
        yield "and a quantize stage (nf4) before the lora stage", step._replace(params={**step.params, **codes})
    elif step.lora is None:
        yield "a lora stage in place of the full one trains far less", step


def _memory_bytes(device: torch.device) -> int:
    """All of the memory of the accelerator, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
