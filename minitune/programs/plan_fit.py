"""Lines on whether the stages of a plan fit into this machine, and on what would make them fit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minitune import hardware, host
from minitune.optim.eight_bit import AdamW8bit
from minitune.planning.memory import StepSpec
from minitune.programs.plan import Planned, planned, quantized_params
from minitune.programs.program import Program
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_model import HOST
from minitune.programs.state import AbstractState
from minitune.quant.schemes import NF4

MIB = 2**20
# Below so many parameters most machines hold a step, and a plan would take longer than the first
# steps; above so many weights (a mixture whose experts stand one by one) it takes half a minute and
# more. A run says nothing then, and the verb plan does.
LEAST_PARAMETERS, MOST_WEIGHTS = 50_000_000, 2000


def memory_lines(source: Program, first: AbstractState) -> dict[str, list[str]]:
    """Lines on the memory of the steps of each training stage, by its label; nothing for a model
    that is very small or of very many weights. first: the state before the first stage."""
    weights = first.params.values()
    if len(weights) > MOST_WEIGHTS or sum(w.numel() for w in weights) < LEAST_PARAMETERS:
        return {}
    found = planned(source, first)
    return {one.stage.label: list(fit_lines(one)) for one in found if isinstance(one.stage, Train)}


def fit_lines(one: Planned) -> Iterator[str]:
    """Lines on whether a stage fits, and on what would make it fit."""
    step, there, n_bytes = one.step, _memory_bytes(one.step.device), one.n_bytes
    needs = (
        f"{one.stage.label}: {step.n_rows} x {step.n_tokens:,} tokens at a time need "
        f"{n_bytes / MIB:,.1f} MiB"
    )
    has = f"of the {there / MIB:,.0f} MiB of this machine's {step.device.type}"
    yield f"{needs}, {n_bytes / there:.0%} {has}: {'fits' if n_bytes <= there else 'does not fit'}"
    for change, less in _smaller(one):
        if n_bytes <= there:
            return
        before, n_bytes = n_bytes, sum(one.memory(less).values())
        if n_bytes < before:
            yield f"  {change}: {n_bytes / MIB:,.1f} MiB{', fits' if n_bytes <= there else ''}"
    if n_bytes > there:
        trains_whole = isinstance(one.stage, Train) and step.lora is None
        yield (
            "  or a smaller model, or a lora stage in place of a full one"
            if trains_whole
            else "  or a smaller model"
        )


def _smaller(one: Planned) -> Iterator[tuple[str, StepSpec]]:
    """Changes to a program that need less memory, the mildest first, each with those before it."""
    if isinstance(one.stage, Train):
        yield from _smaller_step(one.stage, one.step)
    else:
        yield f"with {one.stage.label}.batch_size=1", one.step._replace(n_rows=1)


def _smaller_step(stage: Train, step: StepSpec) -> Iterator[tuple[str, StepSpec]]:
    lora = step.lora is not None
    n_micro = min(stage.micro_batch_size or stage.batch_size, stage.batch_size)
    least = min(n_micro, stage.loss.min_samples)
    step = step._replace(n_rows=step.n_rows // n_micro * least)
    step = step._replace(n_micro_batches=-(-stage.batch_size // least))
    yield f"with {stage.label}.micro_batch_size={least}", step
    step = step._replace(model=step.model._replace(n_remat=step.model.config.n_layers))
    yield f"and {stage.label}.remat=true", step
    if hardware.capabilities(step.device).streams:
        step = step._replace(offloaded=True)
        yield f"and {stage.label}.remat={HOST} in its place", step
    if lora:
        dense = [
            name
            for name, w in step.params.items()
            if isinstance(w, Tensor) and w.ndim == 2 and "_proj." in name
        ]
        codes = quantized_params(
            step.params, {name: NF4() for name in dense if step.params[name].shape[1] % 2 == 0}
        )
        yield (
            "and a quantize stage with scheme nf4 before the lora stage",
            step._replace(params={**step.params, **codes}),
        )
    else:
        yield (
            f"and {stage.label}.optimizer.kind=adamw8bit",
            step._replace(optimizer=AdamW8bit(lr=0.0)),
        )


def _memory_bytes(device: torch.device) -> int:
    """All of the memory of the accelerator, or of this machine."""
    if hardware.is_accelerator(device):
        return hardware.total_bytes(device)
    return host.total_bytes()
