"""The plan verb: whether each training stage of a program fits this machine, and what a step of it is made of."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import costs, hardware, host, models, objectives, program, quant, stages, tree, world
from minitune.costs import Step
from minitune.grad import detached_leaves
from minitune.optim.eight_bit import AdamW8bit
from minitune.stages import sweeping
from minitune.stages.train import HOST, Train
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
    schemes: Mapping[str, quant.Scheme] = MappingProxyType({})
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
            step = _step(stage, made)
            yield Planned(stage, step, costs.floor(step), _flops_per_token(stage, step))


def _step(stage: Train, made: _Made) -> Step:
    draft, (device, _) = made.draft, world.compute_place(made.source)
    params, trainable = _weights(made), _trainable(made)
    optimizer = stage.optimizer_for(trainable, seed=0)
    beside: Trainable = trainable if stage.loss.compares_answers else {}  # as it was before the first step
    if stage.sweep is not None:
        n = len(sweeping.points(stage))
        trainable = beside = tree.map(lambda x: x.new_empty(n, *x.shape), trainable)  # and the best of each so far
    teacher = None
    if stage.teacher is not None:
        teacher_state = _Made(world.drafted(stage.teacher, draft), stage.teacher)
        teacher = objectives.Teacher(teacher_state.draft.model, _weights(teacher_state))
    n_tokens, n_micro = draft.data[stage.data].seq_len, -(-stage.batch_size // (stage.micro_batch_size or stage.batch_size))
    where = device, stage.n_rows, n_tokens, n_micro, made.rounded & draft.whole
    offloaded = stage.remat == HOST and hardware.capabilities(device).streams
    step = Step(draft.model, params, trainable, draft.lora, optimizer, stage.loss, *where, beside, teacher, offloaded)
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), (params, trainable))
        adapted = objectives.apply_trainable(like[0], detached_leaves(like[1]), draft.lora)
        n_remat = stage.n_remat(draft.model, adapted, n_tokens)
    return step._replace(model=draft.model._replace(n_remat=n_remat))


def _flops_per_token(stage: Train, step: Step) -> float:
    """Of a step over rows of one document each, with the forward of a reference or a teacher that is asked in every step."""
    asked = [step.teacher.model] if step.teacher is not None and stage.cached_top_k is None else []
    if stage.loss.needs_reference and stage.reference != "cached":
        asked = [step.model]
    forward = sum(costs.flops_per_token(model, {}, step.n_tokens) for model in asked)
    return costs.flops_per_token(step.model, step.trainable, step.n_tokens) + forward


def _weights(made: _Made) -> Params:
    """The weights in the dtype of compute or as codes, on the meta device."""
    draft, (_, dtype) = made.draft, world.compute_place(made.source)
    schemes = {name: scheme for name, scheme in made.schemes.items() if name in draft.quantized}
    return {**{name: w.to(dtype) for name, w in draft.params.items()}, **_codes(draft.params, schemes)}


def _codes(params: Params, schemes: Mapping[str, quant.Scheme]) -> Params:
    """The weights that have a scheme as codes; of those that are alike one is made."""
    alike = {(params[name].shape, scheme): params[name] for name, scheme in schemes.items()}
    codes = {(shape, scheme): quant.quantize(w, scheme) for (shape, scheme), w in alike.items()}
    return {name: codes[params[name].shape, scheme] for name, scheme in schemes.items()}


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
    table = Table("at the fullest moment [MiB]")
    for one in found:
        table.add_column(one.stage.label, justify="right")
    for name in found[0].parts:
        if any(values := [one.parts[name] for one in found]):
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
    step, there, n_bytes = one.step, _memory_bytes(one.step.device), one.n_bytes
    needs = f"{one.stage.label}: {step.n_rows} x {step.n_tokens:,} tokens at a time need {n_bytes / MIB:,.1f} MiB"
    has = f"of the {there / MIB:,.0f} MiB of this machine's {step.device.type}"
    yield f"{needs}, {n_bytes / there:.0%} {has}: {'fits' if n_bytes <= there else 'does not fit'}"
    for change, less in _smaller(one):
        if n_bytes <= there:
            return
        before, n_bytes = n_bytes, sum(costs.floor(less).values())
        if n_bytes < before:
            yield f"  {change}: {n_bytes / MIB:,.1f} MiB{', fits' if n_bytes <= there else ''}"
    if n_bytes > there:
        yield "  or a smaller model, or a lora stage in place of a full one" if step.lora is None else "  or a smaller model"


def _smaller(one: Planned) -> Iterator[tuple[str, Step]]:
    """Changes to a program that need less memory, the mildest first, each with those before it."""
    step, stage, lora = one.step, one.stage, one.step.lora is not None
    n_micro = stage.micro_batch_size or stage.batch_size
    step = step._replace(n_rows=step.n_rows // n_micro, n_micro_batches=step.n_micro_batches * n_micro)
    yield f"with {stage.label}.micro_batch_size=1", step
    step = step._replace(model=step.model._replace(n_remat=step.model.config.n_layers))
    yield f"and {stage.label}.remat=true", step
    if hardware.capabilities(step.device).streams:
        step = step._replace(offloaded=True)
        yield f"and {stage.label}.remat={HOST} in its place", step
    if lora:
        dense = [name for name, w in step.params.items() if isinstance(w, Tensor) and w.ndim == 2 and "_proj." in name]
        codes = _codes(step.params, {name: quant.NF4() for name in dense if step.params[name].shape[1] % 2 == 0})
        yield "and a quantize stage with scheme nf4 before the lora stage", step._replace(params={**step.params, **codes})
    else:
        yield f"and {stage.label}.optimizer.kind=adamw8bit", step._replace(optimizer=AdamW8bit(lr=0.0))


def _memory_bytes(device: torch.device) -> int:
    """All of the memory of the accelerator, or of this machine."""
    if hardware.is_accelerator(device):
        return hardware.total_bytes(device)
    return host.total_bytes()
