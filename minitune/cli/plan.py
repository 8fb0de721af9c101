"""Plan verb: memory, operations and time of a program's training stages, and whether they fit."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitune.cli.command_result import CommandResult
from minitune.cli.model_folders import with_model
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.planning.devices import Device, names, open_device
from minitune.planning.mesh import Mesh, axes_of, mesh_under, ranks_in_words
from minitune.programs import program
from minitune.programs.allocator import bound_kernel_cache, keep_freed
from minitune.programs.data_facts import TableFacts, data_facts
from minitune.programs.model_paths import models_of
from minitune.programs.plan import Planned, PlanTarget, first_state, planned
from minitune.programs.plan_fit import MIB, Fit, fit
from minitune.programs.plan_parts import model_files
from minitune.programs.plan_rows import as_taken, step_tokens, with_longest
from minitune.programs.plan_time import (
    PlannedTime,
    Reading,
    keep_machine,
    known_machine,
    measured,
    measured_machine,
    planned_time,
)
from minitune.programs.sharding import sharding_of
from minitune.programs.shared_weights import check_shared_weights
from minitune.programs.stages.batches import tokenized_table
from minitune.programs.stages.train import Train
from minitune.programs.state import AbstractState
from minitune.sharding.mesh import n_ranks
from minitune.sharding.ranks import ALONE


class StagePlan(NamedTuple):
    """Memory, fit and time of a stage."""

    planned: Planned
    fit: Fit
    time: PlannedTime | None  # None where no device is known

    @property
    def lines(self) -> list[str]:
        """Lines on it, without those to paste."""
        return [*self.fit.lines, *self.time_lines]

    @property
    def time_lines(self) -> list[str]:
        """Lines on its time."""
        return [] if self.time is None else [*self.time.lines(self.planned.stage.label)]


def show(file: Path, words: Sequence[str], console: Console | None = None) -> CommandResult:
    """Print what each stage of `planned` needs, whether it fits and what it takes; returns the same
    figures. No weight is read.

    words: overrides of the program, --device, --n, --mesh, --plan, --measure. InputError for what
    is wrong with these or the program, and for one without such a stage.
    """
    options = _parser().parse_intermixed_args(words)
    source = program.load(file, with_model(options.overrides, file.stem))
    axes, plan = _ranks_asked(options, source)
    device = None if options.device is None else open_device(options.device)
    target = PlanTarget(device, _mesh(axes, plan, options))
    first = first_state(source)
    _check(options, source, first, target)
    tables: Mapping[str, TableFacts] = {}
    if options.measure:
        tables = data_facts(first, source.stage, source.seed).tables
        first = with_longest(first, tables)
    stages = list(planned(source, first, target))
    if not stages:
        raise InputError(
            f"plan: {file} has no train stage, and no eval or generate stage with a batch_size, "
            "expected one; the memory of other stages is that of their weights"
        )
    devices: Mapping[str, Device] = {}
    screen = console or Console()
    if options.measure:
        keep_freed()  # as a run does
        bound_kernel_cache()
        devices = _measured(stages, tables, source)
        kept = keep_machine([*devices.values()][-1])
        screen.print(Text(f"this machine, as measured: {kept}"), soft_wrap=True)
    plans = [_stage_plan(one, target, devices, tables, first, source.seed) for one in stages]
    of_ranks = [] if target.mesh == Mesh() else [*_rank_lines(axes, plan, source)]
    return _shown(plans, _reading(source, plans), of_ranks, screen)


def _check(options: Any, source: program.Program, first: AbstractState, target: PlanTarget) -> None:
    """InputError for options that do not go together, and for ranks that can't run the program."""
    if options.measure and target != PlanTarget():
        raise InputError(
            "plan: --measure is given with another device or several, expected this machine alone; "
            "drop --device, --n and --mesh, or --measure; a mesh of the program goes with --n 1"
        )
    if target.mesh == Mesh():
        # as a run of one process does, which holds the whole model
        sharding_of(options.plan or source.plan, source.mesh, ALONE, first.model, "cpu")
    check_shared_weights(source, first, target.mesh)


def _shown(
    plans: Sequence[StagePlan], reading: Reading | None, of_ranks: Sequence[str], screen: Console
) -> CommandResult:
    """Figures of the plans of stages, printed."""
    screen.print(_table(plans))
    for line in of_ranks:
        screen.print(Text(line), soft_wrap=True)
    for one in plans:
        for line in (*one.fit.lines, *one.fit.toml, *one.time_lines):
            screen.print(Text(line), soft_wrap=True)
    found: dict[str, Any] = {"stages": {one.planned.stage.label: _figures(one) for one in plans}}
    if of_ranks:
        found["ranks"] = {"lines": list(of_ranks[:1]), "toml": list(of_ranks[1:])}
    if reading is None:
        return CommandResult(found)
    screen.print(Text(reading.line), soft_wrap=True)
    of_reading = {"weight_bytes": reading.n_bytes, "s": reading.seconds}
    return CommandResult({**found, "before_first_step": of_reading})


def _parser() -> OptionParser:
    description = (
        "Show what the training stages of a program need, whether they fit, and what they take. No "
        "weight is read."
    )
    parser = OptionParser("plan PROGRAM", description=description)
    known = ", ".join(names())
    parser.add_argument("--device", metavar="NAME", help=f"plan for one of {known}, or a TOML file")
    parser.add_argument("--n", type=int, metavar="N", help="so many devices: --mesh data=N")
    parser.add_argument("--mesh", metavar="AXES", help="replica=16,data=8: 16 copies of 8 parts")
    parser.add_argument("--plan", metavar="PLAN", help="dp, fsdp, hsdp, cp, tp_fsdp, ep")
    parser.add_argument("--measure", action="store_true", help="time a few layers on this machine")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the program")
    return parser


def _ranks_asked(
    options: Any, source: program.Program
) -> tuple[Mapping[str, int], str | Mapping[str, str]]:
    """(ranks along each axis, plan) that are asked for, or those of the program; a plan that the
    program leaves at dp is fsdp for ranks that are asked for."""
    if options.n is not None and options.mesh is not None:
        raise InputError("plan: --n and --mesh are both given, expected one of them; drop one")
    if options.n is not None and options.n < 1:
        raise InputError(f"plan: --n is {options.n}, expected one device or more; correct it")
    if options.n is None and options.mesh is None:
        return source.mesh, options.plan or source.plan
    axes = axes_of(f"data={options.n}" if options.mesh is None else options.mesh)
    return axes, options.plan or ("fsdp" if source.plan == "dp" else source.plan)


def _mesh(axes: Mapping[str, int], plan: str | Mapping[str, str], options: Any) -> Mesh:
    """Mesh of these ranks; of a single one no mesh, but a plan that is asked for is looked at."""
    is_alone = n_ranks(axes) == 1
    if is_alone and options.plan is None:
        return Mesh()
    mesh = mesh_under(axes, plan)
    return Mesh() if is_alone else mesh


def _rank_lines(
    axes: Mapping[str, int], plan: str | Mapping[str, str], source: program.Program
) -> Iterator[str]:
    """Lines on the ranks of a plan, and what the program lacks to run so."""
    toml = []
    if plan != source.plan:
        toml.append(f'plan = "{plan}"')
    if [*axes.items()] != [*source.mesh.items()] and (source.mesh or [*axes] != ["data"]):
        toml.append(f"mesh = {{ {', '.join(f'{axis} = {n}' for axis, n in axes.items())} }}")
    lacks = "; to run so, put at the top of the program:" if toml else ""
    yield f"{ranks_in_words(axes, plan)}{lacks}"
    yield from toml


def _reading(source: program.Program, plans: Sequence[StagePlan]) -> Reading | None:
    """Weights that are read before the first training stage; None where there are none, or no
    time is known."""
    timed = next((one for one in plans if one.time is not None), None)
    if timed is None or timed.time is None:
        return None
    files = model_files(models_of(source.model, [timed.planned.stage]))
    n_bytes = sum(file.stat().st_size for file in files)
    return Reading(n_bytes, timed.time.device.disk_bytes_per_s) if n_bytes else None


def _measured(
    stages: Sequence[Planned], tables: Mapping[str, TableFacts], source: program.Program
) -> dict[str, Device]:
    """This machine by training stage, with what that attains on it."""
    step = stages[0].step
    dtype = step.params["model.embed_tokens.weight"].dtype
    files = model_files([source.model])
    biggest = max(files, key=lambda file: file.stat().st_size, default=None)
    here = measured_machine(step.device, dtype, file=biggest)
    return {
        one.stage.label: measured(
            as_taken(one, tables[one.stage.data]), tables[one.stage.data], here
        )
        for one in stages
        if isinstance(one.stage, Train)
    }


def _stage_plan(
    one: Planned,
    target: PlanTarget,
    devices: Mapping[str, Device],
    tables: Mapping[str, TableFacts],
    first: AbstractState,
    seed: int,
) -> StagePlan:
    device = target.device or devices.get(one.stage.label)
    if device is None and target == PlanTarget():
        device = known_machine(one.step.device.type)
    if device is None or not isinstance(one.stage, Train):
        return StagePlan(one, fit(one, target), None)
    timed = as_taken(one, tables.get(one.stage.data))
    n_tokens = 0
    if one.stage.evaluate is not None:
        name = one.stage.evaluate.data
        how = *first.text(), seed, first.on_sample(name)
        n_tokens = tokenized_table(name, first.data[name], *how).n_tokens
    return StagePlan(one, fit(one, target), planned_time(timed, device, n_tokens))


def _figures(plan: StagePlan) -> dict[str, Any]:
    """Figures of a stage as JSON takes them."""
    one, time = plan.planned, plan.time
    parts = {**one.parts, "process": one.process_bytes}
    return {
        "bytes": plan.fit.n_bytes,
        "expected_peak_bytes": one.peak_bytes,
        "fits": plan.fit.fits,
        "device_bytes": plan.fit.there,
        "parts": parts,
        "flops": {"token": one.flops_per_token, "step": one.flops_per_token * step_tokens(one)},
        "time": None if time is None else _times(time),
        "lines": plan.lines,
        "toml": plan.fit.toml,
    }


def _times(time: PlannedTime) -> dict[str, Any]:
    step = time.step
    return {
        "step_at_best_s": step.roof_s,
        "step_expected_s": step.expected_s,
        "tokens_per_s_at_best": time.tokens_per_s,
        "end_s": time.end_s,
        "evaluations": {"n": time.n_evaluations, "s": time.evaluation_s},
        "binds": step.binds,
        "sent_bytes": step.sent._asdict(),
        "links_s": {
            "beside_products": step.overlapped_s,
            "between_products": step.exchanged_s,
            "after_products": step.exposed_s,
        },
        "hidden": step.hides_overlapped,
        "fetched": {"bytes": step.fetched, "s": step.fetched_s, "hidden": step.hides_fetched},
    }


def _table(plans: Sequence[StagePlan]) -> Table:
    stages = [one.planned for one in plans]
    table = Table("at the fullest moment [MiB]")
    for one in stages:
        table.add_column(one.stage.label, justify="right")
    for name in dict.fromkeys(name for one in stages for name in one.parts):
        if any(values := [one.parts.get(name, 0) for one in stages]):
            table.add_row(name, *(f"{value / MIB:,.1f}" for value in values))
    if any(one.process_bytes for one in stages):
        table.add_row("process", *(f"{one.process_bytes / MIB:,.1f}" for one in stages))
    table.add_section()
    table.add_row("sum", *(f"{one.fit.n_bytes / MIB:,.1f}" for one in plans))
    if any(one.peak_bytes != plan.fit.n_bytes for one, plan in zip(stages, plans, strict=True)):
        table.add_row("sum with holes", *(f"{one.peak_bytes / MIB:,.1f}" for one in stages))
    table.add_section()
    table.add_row("GFLOP a token", *(f"{one.flops_per_token / 1e9:,.3g}" for one in stages))
    table.add_row(
        "TFLOP a step", *(f"{one.flops_per_token * step_tokens(one) / 1e12:,.3g}" for one in stages)
    )
    return table
