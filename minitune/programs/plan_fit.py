"""Fit of the stages of a plan into a device, and the smallest change that makes one fit."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minitune import hardware, host
from minitune.algorithms.shared_state import check_shared
from minitune.errors import InputError
from minitune.optim.eight_bit import AdamW8bit
from minitune.planning.devices import Device
from minitune.planning.mesh import Mesh, mesh_under
from minitune.planning.step_spec import StepSpec
from minitune.programs.log import say_early
from minitune.programs.plan import HERE, Planned, PlanTarget, planned
from minitune.programs.plan_parts import quantized_params
from minitune.programs.program import Program
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_model import HOST
from minitune.programs.state import AbstractState
from minitune.quant.schemes import NF4

MIB = 2**20
# Below so many parameters most machines hold a step, and a plan would take longer than the first
# steps. A run says nothing then, and the verb plan does.
LEAST_PARAMETERS = 50_000_000


class Change(NamedTuple):
    """Change to a program that needs less memory."""

    words: str
    toml: Sequence[str]  # of the table of the stage, and stages to add
    step: StepSpec


class Fit(NamedTuple):
    """Fit of a stage into the memory of a device, in words, and what makes it fit."""

    n_bytes: int  # that the process and its step need
    there: int  # of the device
    lines: list[str]
    toml: list[str]  # to paste; nothing where it fits, or nothing helps

    @property
    def fits(self) -> bool:
        """True if the stage fits as it is."""
        return self.n_bytes <= self.there


def check_memory(source: Program, first: AbstractState, mesh: Mesh) -> dict[str, Planned]:
    """Plans of the training stages of a program by their labels; InputError for one that does not
    fit, unless the program says that it need not.

    Nothing for a model that is very small. first: the state before the first stage; mesh: of the
    ranks that train.
    """
    if sum(w.numel() for w in first.params.values()) < LEAST_PARAMETERS:
        return {}
    found = {}
    for one in planned(source, first, PlanTarget(mesh=mesh)):
        if not isinstance(one.stage, Train):
            continue
        found[one.stage.label] = one
        if source.must_fit and one.process_bytes + one.n_bytes > memory_bytes(one.step.device):
            fitted = fit(one)
            for line in (*fitted.lines, *fitted.toml):
                say_early(line)
            raise InputError(
                f"plan: {one.stage.label} needs {fitted.n_bytes / MIB:,.0f} MiB, expected at most "
                f"the {fitted.there / MIB:,.0f} MiB that are there; change what the lines before "
                "say, or set must_fit = false to try it anyway"
            )
    return found


def fit(one: Planned, target: PlanTarget = HERE) -> Fit:
    """Fit of a stage into a device of a target, or of this machine."""
    step = one.step
    there = memory_bytes(step.device, target.device)
    n_bytes = one.process_bytes + one.n_bytes
    needs = (
        f"{one.stage.label}: {step.n_rows} x {step.n_tokens:,} tokens at a time need "
        f"{n_bytes / MIB:,.1f} MiB"
    )
    where = f"this machine's {step.device.type}" if target.device is None else "a device"
    verdict = "fits" if n_bytes <= there else "does not fit"
    lines = [f"{needs}, {n_bytes / there:.0%} of the {there / MIB:,.0f} MiB of {where}: {verdict}"]
    if n_bytes <= there:
        return Fit(n_bytes, there, lines, [])
    return _changed(one, Fit(n_bytes, there, lines, []))


def _changed(one: Planned, found: Fit) -> Fit:
    """Fit with the changes that help, up to the first with which the stage fits."""
    least = found.n_bytes
    for change in _smaller(one, found):
        n_bytes = one.process_bytes + sum(one.memory(change.step).values())
        fits = n_bytes <= found.there
        if n_bytes < least:
            ending = ", fits" if fits else ""
            found.lines.append(f"  {change.words}: {n_bytes / MIB:,.1f} MiB{ending}")
            least = n_bytes
        if fits:
            return found._replace(toml=[f"# in the stage {one.stage.label}", *change.toml])
    trains_whole = isinstance(one.stage, Train) and one.step.lora is None
    lora = ", or a lora stage in place of a full one" if trains_whole else ""
    found.lines.append(f"  or a smaller model{lora}")
    return found


def _smaller(one: Planned, found: Fit) -> Iterator[Change]:
    """Changes to a program that need less memory, the mildest first."""
    if isinstance(one.stage, Train):
        yield from _smaller_step(one, one.stage, found)
        return
    label = one.stage.label
    yield Change(f"with {label}.batch_size=1", ["batch_size = 1"], one.step._replace(n_rows=1))


def _smaller_step(one: Planned, stage: Train, found: Fit) -> Iterator[Change]:
    """Fewer rows at a time, as many as fit; blocks that are computed again; then both and more."""
    step, label = one.step, stage.label
    per_sample = stage.loss.rows_per_sample
    least = min(step.n_rows // per_sample, stage.loss.min_samples)
    smallest = _with_rows(step, least * per_sample)
    some = _largest(one, smallest, found)
    for fewer in dict.fromkeys((some.n_rows, smallest.n_rows)):
        n = fewer // per_sample
        words = f"with {label}.micro_batch_size={n}"
        yield Change(words, [f"micro_batch_size = {n}"], _with_rows(step, fewer))
    recomputed = step.model._replace(n_remat=step.model.config.n_layers)
    again = step._replace(model=recomputed)
    yield Change(f"with {label}.remat=true", ["remat = true"], again)
    rows_toml = f"micro_batch_size = {least}"
    step, toml = smallest._replace(model=recomputed), [rows_toml, "remat = true"]
    words = f"with {label}.micro_batch_size={least} and {label}.remat=true"
    little = Change(words, toml, step)
    yield little
    if hardware.capabilities(step.device).streams:
        step, toml = step._replace(offloaded=True), [rows_toml, f'remat = "{HOST}"']
        yield Change(f"and {label}.remat={HOST} in its place", toml, step)
    yield from _smaller_state(step, label, toml)
    if step.device.type != "cpu":
        yield from _on_more_devices(one, stage, little, found.there - one.process_bytes)


def _smaller_state(step: StepSpec, label: str, toml: Sequence[str]) -> Iterator[Change]:
    """Fewer bytes of weights and of the optimizer's state, for a step of few rows at a time."""
    if step.lora is None:
        # codes of moments belong to blocks of a whole weight
        if not any(step.mesh.cuts.get(name) for name in step.trainable):
            words = f"and {label}.optimizer.kind=adamw8bit"
            of_optimizer = 'optimizer = { kind = "adamw8bit", lr = 1e-4 }  # and your learning rate'
            yield Change(words, [*toml, of_optimizer], step._replace(optimizer=AdamW8bit(lr=0.0)))
        return
    linear = [w for name, w in step.params.items() if "_proj." in name]
    if all(isinstance(w, Tensor) for w in linear):  # a weight is quantized once
        nf4 = _nf4(step, toml)
        yield nf4
        step, toml = nf4.step, nf4.toml
    if step.mesh.plan:
        return  # a rank keeps its parts of the base on its device
    place = "host" if hardware.is_accelerator(step.device) else "disk"
    of_model = ["", "# in [model]", f'offload = "{place}"']
    away = step._replace(blocks=place)
    yield Change(f"and model.offload={place}", [*toml, *of_model], away)


def _on_more_devices(one: Planned, stage: Train, little: Change, there: int) -> Iterator[Change]:
    """Step of a change on the fewest devices, a power of two, that hold it in parts under fsdp:
    nothing if the most do not, if the optimizer wants whole weights, or where devices stand on
    other axes than data."""
    step = little.step
    if not {"data"} >= step.mesh.axes.keys():
        return
    n_rows = stage.batch_size * stage.rows_per_sample

    def on(n: int) -> StepSpec:
        mesh = mesh_under({"data": n}, "fsdp").for_model(step.model.config)
        return step._replace(mesh=mesh, n_micro_batches=-(-n_rows // (step.n_rows * n)))

    def fits(n: int) -> bool:
        return sum(one.memory(on(n)).values()) <= there

    numbers = [2**i for i in range(1, 11) if 2**i > step.mesh.n_ranks]
    if not numbers or not fits(numbers[-1]):
        return
    n = numbers[bisect_left(numbers, True, key=fits)]
    if not _is_of_parts(on(n)):
        return
    where = f"# at the top of the program, in place of its plan and mesh, for a run on {n} devices"
    written = [*little.toml, "", where, 'plan = "fsdp"', f"mesh = {{ data = {n} }}"]
    few = stage.batch_size < n
    idle = f" (a batch has rows for {stage.batch_size} of them)" if few else ""
    yield Change(f"or {little.words} on {n} devices under fsdp{idle}", written, on(n))


def _is_of_parts(step: StepSpec) -> bool:
    """True for a step whose optimizer updates the parts that a rank holds."""
    shared = [name for name in step.trainable if step.mesh.cuts.get(name)]
    try:
        check_shared(step.optimizer, step.trainable, shared)
    except InputError:
        return False
    return True


def _largest(one: Planned, smallest: StepSpec, found: Fit) -> StepSpec:
    """Step of as many rows as fit, a power of two times the least: what a row needs is known from
    two numbers of them."""
    step, least = one.step, smallest.n_rows
    if step.n_rows == least:
        return smallest
    n_bytes = one.process_bytes + sum(one.memory(smallest).values())
    per_row = (found.n_bytes - n_bytes) / (step.n_rows - least)
    room = (found.there - n_bytes) / per_row if per_row > 0 else 0
    n = least
    while 2 * n < step.n_rows and 2 * n - least <= room:
        n = 2 * n
    return _with_rows(step, n)


def _with_rows(step: StepSpec, n_rows: int) -> StepSpec:
    """Step of as many rows in all, n_rows of them at a time."""
    n_in_all = step.n_rows * step.n_micro_batches
    return step._replace(n_rows=n_rows, n_micro_batches=-(-n_in_all // n_rows))


def _nf4(step: StepSpec, toml: Sequence[str]) -> Change:
    """Step whose adapted weights are NF4 codes."""
    dense = [
        name
        for name, w in step.params.items()
        if isinstance(w, Tensor) and w.ndim == 2 and "_proj." in name and w.shape[1] % 2 == 0
    ]
    codes = quantized_params(step.params, {name: NF4() for name in dense})
    stage = ["", "# before the lora stage", "[[stage]]", 'op = "quantize"']
    stage += ['scheme = { kind = "nf4" }', 'weights = ["*_proj.weight"]']
    return Change(
        "and a quantize stage with scheme nf4 before the lora stage",
        [*toml, *stage],
        step._replace(params={**step.params, **codes}),
    )


def memory_bytes(device: torch.device, target: Device | None = None) -> int:
    """Memory of a device by name, of the accelerator here, or of this machine."""
    if target is not None:
        return target.memory_bytes
    if hardware.is_accelerator(device):
        return hardware.total_bytes(device)
    return host.total_bytes()
