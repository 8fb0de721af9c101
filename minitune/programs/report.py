"""Report of a finished run for a person: what it learned, how fast, in how much memory, and where
the result lies.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minitune.errors import cut
from minitune.programs.progress import readings
from minitune.programs.records import Sample, StageRecord, rounding_warning, stage_records

MAX_LINES, MAX_CHARACTERS = 6, 600  # of a sample on the screen
LOSS = "loss [nats a token]"
PAIR_LOSS = "loss [nats a pair]"  # of stages that compare two answers
TASKS = "tasks"
COLUMNS = (
    LOSS,
    PAIR_LOSS,
    "best held-out",
    "exact match",
    "reward accuracy",
    TASKS,
    "size [MiB]",
    "time [s]",
    "skipped steps",
)


def report(title: str, summary: Mapping[str, Any], width: int = 100) -> RenderableType:
    """Content of a summary.json as one table of stages, the evaluations' samples side by side, and
    a line of figures.

    On a terminal too narrow for the table (width: its characters) each stage is a line.
    """
    records = stage_records(summary, "the summary")
    evals = {name: record for name, record in records.items() if record.loss_nats is not None}
    parts: list[RenderableType] = [Text()]
    if any(_has_figures(record) for record in records.values()):
        parts += _stages(title, records, width)
    parts += [Text(line) for name, record in records.items() for line in _training(name, record)]
    if evals:
        parts += _samples(evals)
    names = ("steps", "tokens_per_s", "peak_mem_bytes")
    figures = {name: summary[name] for name in names if isinstance(summary.get(name), int | float)}
    parts += [Text(readings(figures))] if figures else []
    for name, record in records.items():
        parts += [Text(f"{record.what} in {record.path}")] if record.path else []
        warning = rounding_warning(name, record.merge_error, record.onto)
        parts += [Text(warning)] if warning is not None else []
    return Group(*parts)


def _has_figures(record: StageRecord) -> bool:
    figures = (record.loss_nats, record.steps, record.bytes, record.bytes_after)
    return bool(record.tasks) or any(figure is not None for figure in figures)


def _stages(title: str, records: Mapping[str, StageRecord], width: int) -> list[RenderableType]:
    """Table of the stages with figures, without the columns that none of them has."""
    rows = {name: _cells(record) for name, record in records.items() if _has_figures(record)}
    used = [column for column in COLUMNS if any(cells[column] for cells in rows.values())]
    table = Table(title=title, title_justify="left")
    table.add_column("stage", no_wrap=True)
    for column in used:
        table.add_column(Text(column), justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *(cells[column] for column in used))
    columns = {"stage": list(rows), **{name: [row[name] for row in rows.values()] for name in used}}
    widths = [
        max(len(line) for text in (name, *texts) for line in text.splitlines() or [""])
        for name, texts in columns.items()
    ]
    if sum(widths) + 3 * len(widths) + 1 <= width:
        return [table]
    lines: list[RenderableType] = [Text(title)]
    for name, cells in rows.items():
        lines.append(Text(name))
        lines += [Text(f"  {column}: {cells[column]}") for column in used if cells[column]]
    return lines


def _cells(record: StageRecord) -> dict[str, str]:
    """Figures of a stage by column, each empty where the stage has none."""
    cells: dict[str, str] = dict.fromkeys(COLUMNS, "")
    loss = record.mean_loss if record.loss_nats is None else record.loss_nats
    if loss is not None:
        cells[LOSS if record.reward_accuracy is None else PAIR_LOSS] = f"{loss:.4f}"
    if record.exact_match is not None:
        cells["exact match"] = f"{record.exact_match:.1%} of {record.n_prompts}"
    if record.best_heldout_nats is not None:
        cells["best held-out"] = f"{record.best_heldout_nats:.4f}"
    if record.reward_accuracy is not None:
        cells["reward accuracy"] = f"{record.reward_accuracy:.1%}"
    cells[TASKS] = "\n".join(
        f"{task} {name} {metric.value:.4f}"
        for task, result in record.tasks.items()
        for name, metric in result.metrics.items()
        if metric.value is not None
    )
    sizes = (record.model_bytes, record.bytes, record.bytes_after)
    n_bytes = next((size for size in sizes if size is not None), None)
    if n_bytes is not None:
        cells["size [MiB]"] = f"{n_bytes / 2**20:.2f}"
    if record.time_s is not None:
        cells["time [s]"] = f"{record.time_s:.1f}"
    if record.n_skipped:
        cells["skipped steps"] = f"{record.n_skipped} of {record.steps}"
    return cells


def _training(name: str, record: StageRecord) -> Iterator[str]:
    """Lines on what the figures of a training stage are of."""
    if record.mean_loss is not None and record.last_loss is not None:
        means = f"means of the last {record.n_mean_steps} training steps"
        yield f"{name}: {means}; the loss of the last one is {record.last_loss:.4f}"
    if record.best_heldout_nats is not None and record.best_step is not None:
        yield f"{name}: step {record.best_step} has the best held-out loss"
    if record.ended_at_step is not None:
        yield f"{name}: ended at step {record.ended_at_step} of {record.planned_steps}"


def clipped(text: str) -> str:
    """Text of a sample for the screen: without empty lines, and at most MAX_LINES of the others."""
    lines = [line for line in text.splitlines() if line.strip()]
    more = [f"... {len(lines) - MAX_LINES:,} more lines"] if len(lines) > MAX_LINES else []
    return cut("\n".join([*lines[:MAX_LINES], *more]), MAX_CHARACTERS)


def _samples(evals: Mapping[str, StageRecord]) -> Iterator[RenderableType]:
    kept: dict[str, tuple[Sample, ...]] = {name: record.samples for name, record in evals.items()}
    width = max(map(len, ("reference", *kept)))
    first = next(iter(kept.values()))
    for i, sample in enumerate(first):
        yield Text(f"{'prompt':{width}}  {clipped(str(sample.prompt))}", style="bold")
        yield Text(f"{'reference':{width}}  {clipped(sample.reference)}", style="green")
        for name, samples in kept.items():
            if i < len(samples) and samples[i].prompt == sample.prompt:
                yield Text(f"{name:{width}}  {clipped(samples[i].answer)}")
        yield Text()
