"""Plan verb: memory and floating-point operations of a program's training stages, and whether they
fit.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitune.cli.command_result import CommandResult
from minitune.errors import InputError
from minitune.programs import program
from minitune.programs.plan import Planned, planned
from minitune.programs.plan_fit import MIB, fit_lines


def show(file: Path, overrides: Sequence[str], console: Console | None = None) -> CommandResult:
    """Print what each stage of `planned` needs and whether it fits; returns the same figures. No
    weight is read.

    InputError for what is wrong with the program, and for one without such a stage.
    """
    stages = list(planned(program.load(file, overrides)))
    if not stages:
        raise InputError(
            f"plan: {file} has no train stage, and no eval or generate stage with a batch_size, "
            "expected one; the memory of other stages is that of their weights"
        )
    screen = console or Console()
    screen.print(_table(stages))
    lines = {one.stage.label: list(fit_lines(one)) for one in stages}
    for line in chain.from_iterable(lines.values()):
        screen.print(Text(line), soft_wrap=True)
    figures = {one.stage.label: _figures(one, lines[one.stage.label]) for one in stages}
    return CommandResult({"stages": figures})


def _figures(one: Planned, lines: Sequence[str]) -> dict[str, Any]:
    """Figures of a stage as JSON takes them."""
    flops = {"token": one.flops_per_token, "step": one.flops_per_token * _tokens(one)}
    return {"bytes": one.n_bytes, "parts": one.parts, "flops": flops, "lines": lines}


def _table(stages: Sequence[Planned]) -> Table:
    table = Table("at the fullest moment [MiB]")
    for one in stages:
        table.add_column(one.stage.label, justify="right")
    for name in dict.fromkeys(name for one in stages for name in one.parts):
        if any(values := [one.parts.get(name, 0) for one in stages]):
            table.add_row(name, *(f"{value / MIB:,.1f}" for value in values))
    table.add_section()
    table.add_row("sum", *(f"{one.n_bytes / MIB:,.1f}" for one in stages))
    table.add_section()
    table.add_row("GFLOP a token", *(f"{one.flops_per_token / 1e9:,.3g}" for one in stages))
    table.add_row(
        "TFLOP a step", *(f"{one.flops_per_token * _tokens(one) / 1e12:,.3g}" for one in stages)
    )
    return table


def _tokens(one: Planned) -> int:
    return one.step.n_rows * one.step.n_tokens * one.step.n_micro_batches
