"""Runs: a program from its first stage, or from where it stopped, to its summary."""

from collections.abc import Mapping
from time import perf_counter

import msgspec

from minitune.io.results import Record
from minitune.programs import log, save_paths
from minitune.programs.allocator import keep_freed
from minitune.programs.check import check, data_notes
from minitune.programs.loading import open_pipeline
from minitune.programs.program import Program, resolved
from minitune.programs.report import report
from minitune.programs.run_folder import open_run, write_record
from minitune.programs.signals import StopSignals
from minitune.programs.stages.ahead import first_rules, tokens_at_once
from minitune.programs.state import Stopped


def run_program(program: Program, stop: StopSignals | None = None) -> Record:
    """Run or continue a program and return what its summary.json holds.

    Raises InputError for what the user must change, and state.Stopped after a signal, when the state has been saved.
    """
    keep_freed()
    check(program.model, program.data, program.stage)  # before a folder is made or a weight is read
    save_paths.check(program)
    run = open_run(program, program_text=resolved(program))
    as_dict = msgspec.to_builtins(program)
    with run.lock, stop or StopSignals() as stopping, log.Log(run.folder, program.log, as_dict) as out:
        for note in (*run.notes, *data_notes(program.model, program.data)):
            out.say(note)
        state = open_pipeline(
            program.model,
            program.data,
            program.seed,
            run.folder,
            out,
            stopping,
            run.records,
            program.tf32,
            tokens_at_once=tokens_at_once(program.stage, program.data),
            first_rules=first_rules(program.stage),
        )
        for stage in program.stage:
            if stopping():
                raise Stopped(summary(state.records).get("steps", 0), run.folder)
            out.begin(stage.label)
            started = perf_counter()
            state = stage.run(state)
            if stage.label in state.records:
                state = state.record(stage.label, {"time_s": perf_counter() - started, **state.records[stage.label]})
            write_record(run.folder / "records.json", state.records)
        result = summary(state.records)
        write_record(run.folder / "summary.json", result)
        out.show(report(program.name, result))
        out.say(f"{run.folder} holds this run: summary.json, metrics.jsonl, checkpoints, and the program that made them")
    return result


def summary(records: Mapping[str, Record]) -> Record:
    """Records by stage name, with what stands under their key "top" moved to the top level."""
    top = {key: value for record in records.values() for key, value in record.get("top", {}).items()}
    return {name: {key: value for key, value in record.items() if key != "top"} for name, record in records.items()} | top
