"""Runs: a program from its first stage, or from where it stopped, to its summary."""

from collections.abc import Mapping, Sequence
from time import perf_counter

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
from minitune.programs.plan_fit import memory_lines
from minitune.programs.program import Program, WrittenProgram
from minitune.programs.records import summary, write_record
from minitune.programs.report import report
from minitune.programs.run_folder import Run, open_run
from minitune.programs.signals import StopSignals
from minitune.programs.stages.ahead import first_rules, tokens_at_once
from minitune.programs.state import AbstractState, PipelineState
from minitune.programs.variables import NO_VARIABLES, WrittenStrings, as_written


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
    # before a folder is made or a weight is read
    program.log.check()
    checked = check(program.model, program.data, program.stage, log.say_early)
    program = msgspec.structs.replace(program, data=checked.data)
    save_paths.check(program)
    run = open_run(WrittenProgram(program, written), end=end)
    as_dict = as_written(msgspec.to_builtins(program), written)
    if run.summary is not None:
        out = log.Log(run.folder, program.log, as_dict)
        with run.lock:
            _show_finished(program, run.summary, out, run.notes)
        return run.summary
    with run.lock, stop or StopSignals() as stop, log.Log(run.folder, program.log, as_dict) as out:
        data_lines = data_notes(program.model, program.data, program.stage)
        for note in (*run.notes, *data_lines, *checked.lengths):
            out.say(note)
        return _run_stages(program, run, stop, out, checked.first)


def _run_stages(
    program: Program, run: Run, stop: StopSignals, out: log.Log, first: AbstractState
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
    _write_page(run, out)
    # the last line that a person reads is ours
    out.close_trackers()
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
        return state._replace(memory_lines=memory_lines(program, first), stages=stages)


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
