"""Data verb: what the data of a program holds, before anything is loaded or trained."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitune.cli.command_result import CommandResult
from minitune.errors import InputError
from minitune.programs import log, program
from minitune.programs.check import check
from minitune.programs.data_facts import DataFacts, TableFacts, data_facts
from minitune.programs.stage_estimates import StageEstimate, stage_estimates
from minitune.programs.stages.expected_time import duration

BAR_CHARACTERS = 40  # of the longest bar of a histogram


def show(file: Path, overrides: Sequence[str], console: Console | None = None) -> CommandResult:
    """Print lengths, left out samples, targets, repeats, overlap and estimates of a program's data;
    returns the same figures.

    InputError for what is wrong with the program, and for one that trains and measures on nothing.
    """
    asked = program.load(file, overrides)
    checked = check(asked.model, asked.data, asked.stage, log.say_early)
    facts = data_facts(checked.first, asked.stage, asked.seed)
    if not facts.tables:
        raise InputError(
            f"data: {file} has no train stage and no eval stage, expected one that names a [data] "
            "table; `show-sample` shows the rows of a program without"
        )
    estimates = stage_estimates(asked, checked.first, facts)
    screen = console or Console()
    for name, table in facts.tables.items():
        screen.print(Text(f"data.{name}: {table.path}", style="bold"), soft_wrap=True)
        screen.print(_figures(table))
        for line in _histogram(table):
            screen.print(Text(line), soft_wrap=True)
    for line in (*_overlap_lines(facts), *map(_estimate_line, estimates)):
        screen.print(Text(line), soft_wrap=True)
    for note in facts.notes():
        screen.print(Text(f"note: {note}"), soft_wrap=True)
    found = {**msgspec.to_builtins(facts), "stages": msgspec.to_builtins(estimates)}
    return CommandResult({**found, "notes": facts.notes()})


def _figures(facts: TableFacts) -> Table:
    """Table of the counts of one data table."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    share = facts.n_target_tokens / facts.n_tokens
    rows = {
        "samples": f"{facts.n_samples:,}",
        "tokens an epoch": f"{facts.n_tokens:,}",
        "of them targets": f"{facts.n_target_tokens:,} ({share:.1%})",
        "rows an epoch": f"{facts.n_rows:,} of seq_len = {facts.seq_len:,}",
        "mean, median, longest": (
            f"{facts.lengths.mean:,.1f}, {facts.lengths.median:,.1f}, {facts.lengths.longest:,}"
        ),
        "repeat another sample": "not compared" if facts.n_repeated is None else facts.n_repeated,
        **facts.left_out,
    }
    if facts.fill is not None:
        rows["rows are full to"] = f"{facts.fill:.1%}"
    if facts.template is not None:
        rows["conversations looked at"] = facts.template.n_conversations
        rows["of more than one answer"] = facts.template.n_with_history
        rows["with an earlier answer rewritten"] = facts.template.n_rewritten
        rows["with a prompt appended"] = facts.template.n_prompted
    for title, value in rows.items():
        table.add_row(Text(title), f"{value:,}" if isinstance(value, int) else value)
    return table


def _histogram(facts: TableFacts) -> Iterator[str]:
    """Yield a line for each bar of the histogram of lengths."""
    width, counts = facts.lengths.width, facts.lengths.counts
    digits = len(f"{width * len(counts):,}")
    first = next(i for i, n in enumerate(counts) if n)
    for i, n in enumerate(counts[first:], first):
        bar = "█" * -(-n * BAR_CHARACTERS // max(counts))
        span = f"{i * width + 1:>{digits},} to {(i + 1) * width:>{digits},} tokens"
        yield f"{span} {bar} {n:,}"


def _overlap_lines(facts: DataFacts) -> Iterator[str]:
    """Yield what measured tables share with trained ones."""
    for one in facts.overlaps:
        yield (
            f"overlap of {one.measured} with {one.trained}: {one.n_equal:,} of {one.n_samples:,} "
            f"samples are equal, {one.n_equal_prompts:,} have an equal prompt"
        )


def _estimate_line(one: StageEstimate) -> str:
    """Words on the steps of a stage and their time."""
    epochs = one.steps / one.epoch_steps
    counted = (
        f"{one.stage}: an epoch of {one.data} is {one.epoch_tokens:,} tokens, "
        f"{one.epoch_steps:,.4g} steps; {one.steps:,} steps are {epochs:,.4g} epochs, "
        f"{one.tokens:,} tokens"
    )
    if one.time_s is None:
        return counted
    how = "at least, by the rate of a matrix product" if one.time_is == "at least" else one.time_is
    return f"{counted}; {duration(one.time_s)} without evaluations ({how})"
