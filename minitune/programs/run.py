"""Runs: a program from its first stage, or from where it stopped, to its summary."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.io.results import Record
from minitune.programs import log, save_paths
from minitune.programs.allocator import bound_kernel_cache, keep_freed
from minitune.programs.check import check, data_notes
from minitune.programs.data_facts import FILE as FACTS
from minitune.programs.data_facts import data_facts
from minitune.programs.ended import Chosen
from minitune.programs.loading import open_pipeline
from minitune.programs.page.page import write_page
from minitune.programs.page.run_files import read_run
from minitune.programs.plan import Planned
from minitune.programs.plan_fit import check_memory, fit
from minitune.programs.plan_time import known_machine, planned_time
from minitune.programs.program import Program, resolved
from minitune.programs.records import summary, write_record
from minitune.programs.report import report
from minitune.programs.run_folder import Run, open_run
from minitune.programs.signals import StopSignals
from minitune.programs.stages.ahead import first_rules, tokens_at_once
from minitune.programs.state import AbstractState, PipelineState


def run_program(
    program: Program,
    stop: StopSignals | None = None,
    *,
    end: Chosen | None = None,
) -> Record:
    """Run or continue a program and return what its summary.json holds.

    end: of the training that is unfinished, with its newest or its best state; what comes after it
    is run.
    Raises InputError for what the user must change, and signals.Stopped after a signal, when the
    state has been saved.
    """
    keep_freed()
    bound_kernel_cache()
    # before a folder is made or a weight is read
    program.log.check()
    checked = check(program.model, program.data, program.stage, log.say_early)
    program = msgspec.structs.replace(program, data=checked.data)
    save_paths.check(program)
    plans = check_memory(program, checked.first)
    run = open_run(program, program_text=resolved(program), end=end)
    as_dict = msgspec.to_builtins(program)
    if run.summary is not None:
        out = log.Log(run.folder, program.log, as_dict)
        with run.lock:
            _show_finished(program, run.summary, out, run.notes)
        return run.summary
    with run.lock, stop or StopSignals() as stop, log.Log(run.folder, program.log, as_dict) as out:
        for one in plans.values():
            for line in fit(one).lines:
                out.say(line)
        data_lines = data_notes(program.model, program.data, program.stage)
        for note in (*run.notes, *data_lines, *checked.lengths):
            out.say(note)
        return _run_stages(program, run, stop, out, checked.first, plans)


def _run_stages(
    program: Program,
    run: Run,
    stop: StopSignals,
    out: log.Log,
    first: AbstractState,
    plans: Mapping[str, Planned],
) -> Record:
    """Content of summary.json after all stages; first: the state before them, without weights."""
    state = _opened(program, run, stop, out, first)
    facts = data_facts(first, program.stage, program.seed)
    if facts.tables:
        write_record(run.folder / FACTS, facts)
    for stage in program.stage:
        out.begin(stage.label)
        started = perf_counter()
        with stop.at_once(_steps_taken(state.records), run.folder):
            state = stage.run(state)
        if stage.label in state.records:
            time_s = perf_counter() - started
            state = state.record(stage.label, {"time_s": time_s, **state.records[stage.label]})
            if stage.label not in run.records:
                out.record(stage.label, state.records[stage.label])
        write_record(run.folder / "records.json", state.records)
    result = summary(state.records)
    write_record(run.folder / "summary.json", result)
    out.summarize(result)
    out.show(report(program.name, result, out.width))
    for label, one in plans.items():
        out.say(_beside_plan(label, one, state.records.get(label, {})))
    _write_page(run, out)
    files = "summary.json, metrics.jsonl, log.txt, checkpoints, the program that made them"
    out.say(f"{run.folder} holds this run: {files}")
    return result


def _opened(
    program: Program, run: Run, stop: StopSignals, out: log.Log, first: AbstractState
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
        )
        stages = {stage.label: stage for stage in program.stage}
        return state._replace(stages=stages)


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


def _show_finished(program: Program, content: Record, out: log.Log, notes: Sequence[str]) -> None:
    """Show the table of a run that an earlier command finished; no tracker is opened for it."""
    for note in notes:
        out.say(note)
    out.show(report(program.name, content, out.width))
