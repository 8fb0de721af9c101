"""Runs: a program from its first stage, or from where it stopped, to its summary."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.io.results import Record
from minitune.planning.mesh import mesh_under, ranks_in_words
from minitune.programs import log, save_paths
from minitune.programs.allocator import bound_kernel_cache, keep_freed
from minitune.programs.check import check, data_notes
from minitune.programs.data_facts import FILE as FACTS
from minitune.programs.data_facts import data_facts
from minitune.programs.ended import Chosen
from minitune.programs.loading import device_and_dtype, open_pipeline
from minitune.programs.page.page import write_page
from minitune.programs.page.run_files import read_run
from minitune.programs.plan import Planned
from minitune.programs.plan_fit import check_memory, fit
from minitune.programs.plan_time import known_machine, planned_time
from minitune.programs.profiling.check import check_steps
from minitune.programs.program import Program, WrittenProgram
from minitune.programs.records import summary, write_record
from minitune.programs.report import report
from minitune.programs.run_folder import Run, open_run
from minitune.programs.run_ranks import (
    backend_for,
    log_for,
    planned_mesh,
    ranks_of_launch,
    run_for_all,
    runs_everywhere,
    stages_on_ranks,
    with_first_records,
)
from minitune.programs.sharding import Sharding, sharding_of
from minitune.programs.shared_weights import check_shared_weights
from minitune.programs.signals import StopSignals
from minitune.programs.stages.ahead import first_rules, tokens_at_once
from minitune.programs.state import AbstractState, PipelineStage, PipelineState
from minitune.programs.variables import NO_VARIABLES, WrittenStrings, as_written
from minitune.sharding.mesh import n_sharers
from minitune.sharding.ranks import Ranks


def run_program(
    program: Program,
    stop: StopSignals | None = None,
    *,
    end: Chosen | None = None,
    written: WrittenStrings = NO_VARIABLES,
) -> Record:
    """Run or continue a program and return what its summary.json holds.

    end: of the training that is unfinished, with its newest or its best state; what comes after it
    is run. written: strings of the program with variables, which the run folder, trackers and cards
    have as they were written.
    Raises InputError for what the user must change, and signals.Stopped after a signal, when the
    state has been saved.
    """
    keep_freed()
    bound_kernel_cache()
    with ranks_of_launch() as ranks:
        return _run(WrittenProgram(program, written), stop, end, ranks)


class _Start(NamedTuple):
    """Program, run folder and plans of a run before a weight is read."""

    program: Program  # its lengths decided, its stages as the ranks run them
    first: AbstractState  # before the first stage
    sharding: Sharding | None
    ranks: Ranks  # which know how many of them work on the same rows
    run: Run
    plans: Mapping[str, Planned]
    notes: Sequence[str]  # for the user


def _run(
    asked: WrittenProgram,
    stop: StopSignals | None,
    end: Chosen | None,
    ranks: Ranks,
) -> Record:
    start = _started(asked, end, ranks)
    program, ranks, run = start.program, start.ranks, start.run
    if run.summary is not None:
        with run.lock:
            _show_finished(program, run.summary, run, ranks)
        return run.summary
    as_dict = as_written(msgspec.to_builtins(program), asked.written)
    logged = log_for(ranks, run, program.log, as_dict)
    with run.lock, stop or StopSignals() as stop, logged as out:
        for note in start.notes:
            out.say(note)
        state = _opened(program, run, stop, out, ranks, start.sharding)
        if ranks.is_first:
            _write_facts(program, run, start.first)
        for stage in program.stage:
            state = _run_stage(stage, state, run)
        return _finished(program, run, state, start.plans)


def _started(asked: WrittenProgram, end: Chosen | None, ranks: Ranks) -> _Start:
    """Checked program and its run folder, which the first rank opens for all."""
    program, written = asked
    stages = stages_on_ranks(program, ranks)
    say = log.say_early if ranks.is_first else _say_nothing
    with ranks.first_on_node():
        program.log.check()
        checked = check(program.model, program.data, program.stage, say)
    program = msgspec.structs.replace(program, data=checked.data)
    lines = [*checked.lengths, *check_steps(program.profile, program.stage, checked.first)]
    device, _ = device_and_dtype(program.model)
    how = ranks, checked.first.model, device.type
    sharding = sharding_of(program.plan, program.mesh, *how)
    mesh = mesh_under(program.mesh or {"data": ranks.size}, program.plan)
    check_shared_weights(program, checked.first, mesh)
    of_ranks = msgspec.structs.replace(program, stage=stages)
    if sharding is not None:
        ranks = ranks._replace(sharers=n_sharers(program.mesh))

    opened, plans = None, {}
    if ranks.is_first:
        save_paths.check(program)
        plans = check_memory(of_ranks, checked.first, planned_mesh(program, ranks))
        opened = open_run(WrittenProgram(program, written), end=end)
    run = run_for_all(ranks, opened)
    plan_lines = [line for one in plans.values() for line in fit(one).lines]
    data_lines = data_notes(program.model, program.data, program.stage)
    notes = [*plan_lines, *run.notes, *data_lines, *lines]
    if ranks.size > 1:
        notes.append(f"{ranks_in_words(mesh.axes, program.plan)} ({backend_for(device.type)})")
    elif program.divides_model:
        notes.append("plan: one process has the whole model; --ranks or torchrun starts several")
    return _Start(of_ranks, checked.first, sharding, ranks, run, plans, notes)


def _write_facts(program: Program, run: Run, first: AbstractState) -> None:
    facts = data_facts(first, program.stage, program.seed)
    if facts.tables:
        write_record(run.folder / FACTS, facts)


def _run_stage(stage: PipelineStage, state: PipelineState, run: Run) -> PipelineState:
    """State after a stage; one that leaves the model as it is runs on the first rank alone, unless
    it needs a forward of weights that all share.
    """
    ranks, out = state.ranks, state.log
    out.begin(stage.label)
    started = perf_counter()
    with state.stopping.at_once(_steps_taken(state.records), run.folder):
        if runs_everywhere(stage, state):
            state = stage.run(state)
        elif ranks.is_first:
            state = state._replace(records=stage.run(state).records)
        state = with_first_records(state)
    if stage.label in state.records:
        time_s = perf_counter() - started
        state = state.record(stage.label, {"time_s": time_s, **state.records[stage.label]})
        if stage.label not in run.records:
            out.record(stage.label, state.records[stage.label])
    if ranks.is_first:
        write_record(run.folder / "records.json", state.records)
    return state


def _finished(
    program: Program,
    run: Run,
    state: PipelineState,
    plans: Mapping[str, Planned],
) -> Record:
    """Content of summary.json after all stages, which the first rank writes, shows and tells."""
    ranks, out = state.ranks, state.log
    result = summary(state.records)
    if ranks.is_first:
        write_record(run.folder / "summary.json", result)
        out.summarize(result)
        out.show(report(program.name, result, out.width))
        for label, one in plans.items():
            out.say(_beside_plan(label, one, state.records.get(label, {})))
        _write_page(run, out)
        # the last line that a person reads is ours
        out.close_trackers()
        files = "summary.json, metrics.jsonl, log.txt, checkpoints, the program that made them"
        out.say(f"{run.folder} holds this run: {files}")
    text = ranks.text_from_first(msgspec.json.encode(result).decode())
    return result if ranks.is_first else msgspec.json.decode(text)


def _opened(
    program: Program,
    run: Run,
    stop: StopSignals,
    out: log.Log,
    ranks: Ranks,
    sharding: Sharding | None,
) -> PipelineState:
    """State before the first stage, with its weights."""
    # Whatever takes no steps is done again after a stop, so that a signal may end it anywhere.
    with stop.at_once(_steps_taken(run.records), run.folder):
        state = open_pipeline(
            program.model,
            program.data,
            program.seed,
            run.folder,
            out,
            stop,
            run.records,
            program.tf32,
            tokens_at_once=tokens_at_once(program.stage, program.data),
            first_rules=first_rules(program.stage),
            ended=run.ended,
            sharding=sharding,
        )
        stages = {stage.label: stage for stage in program.stage}
        profile = program.profile if ranks.is_first else None
        return state._replace(stages=stages, profile=profile, ranks=ranks)


def _beside_plan(label: str, one: Planned, record: Mapping[str, Any]) -> str:
    """Line on the memory of a stage, and on its speed where the machine is known: as planned, and
    as measured."""
    n_bytes = one.peak_bytes
    planned_words = f"{label}: planned {n_bytes / 2**20:,.0f} MiB"
    top = record.get("top", {})
    if "peak_mem_bytes" not in top:
        return f"{planned_words}, nothing was measured"
    peak, machine = top["peak_mem_bytes"], known_machine(one.step.device.type)
    line = f"{planned_words}, measured {peak / 2**20:,.0f} MiB ({peak / n_bytes:.0%})"
    if machine is None or not top.get("tokens_per_s"):
        return line
    time, rate = planned_time(one, machine), top["tokens_per_s"]
    expected = time.tokens / time.step.expected_s
    return (
        f"{line}; expected {expected:,.0f} tokens/s, measured {rate:,.0f} ({rate / expected:.0%})"
    )


def _write_page(run: Run, out: log.Log) -> None:
    """Write report.html, where its library is installed; a page that fails ends no run."""
    try:
        out.say(f"curves, samples and advice: {write_page(read_run(run.folder))}")
    except InputError as error:
        out.say(f"no report.html: {error}")
    except Exception as error:
        out.say(f"no report.html: {type(error).__name__}: {error}")


def _steps_taken(records: Mapping[str, Record]) -> int:
    """Steps of the last training stage that is finished."""
    return int(summary(records).get("steps") or 0)


def _show_finished(program: Program, content: Record, run: Run, ranks: Ranks) -> None:
    """Show the table of a run that an earlier command finished; no tracker is opened for it."""
    if not ranks.is_first:
        return
    out = log.Log(run.folder, program.log, msgspec.to_builtins(program))
    for note in run.notes:
        out.say(note)
    out.show(report(program.name, content, out.width))


def _say_nothing(text: str) -> None:
    """Say nothing: the first rank says it."""
