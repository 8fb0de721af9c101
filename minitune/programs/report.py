"""Report of a finished run for a person: what it learned, how fast, in how much memory, and where the result lies."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minitune.programs.log import readings
from minitune.programs.records import Sample, StageRecord, stage_records


def report(title: str, summary: Mapping[str, Any]) -> RenderableType:
    """Content of a summary.json as one table of stages, the evaluations' samples side by side, and
    a line of figures."""
    records = stage_records(summary, "the summary")
    evals = {name: record for name, record in records.items() if record.loss_nats is not None}
    parts: list[RenderableType] = [Text()]
    if any(_has_figures(record) for record in records.values()):
        parts += [_stages(title, records)]
    if evals:
        parts += _samples(evals)
    names = ("steps", "tokens_per_s", "peak_mem_bytes")
    figures = {name: summary[name] for name in names if isinstance(summary.get(name), int | float)}
    parts += [Text(readings(figures))] if figures else []
    parts += [Text(f"{record.what} in {record.path}") for record in records.values() if record.path]
    return Group(*parts)


def _has_figures(record: StageRecord) -> bool:
    figures = (record.loss_nats, record.steps, record.bytes, record.bytes_after)
    return any(figure is not None for figure in figures)


def _stages(title: str, records: Mapping[str, StageRecord]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    columns = ["loss [nats a token]", "exact match", "size [MiB]", "time [s]"]
    any_skipped = any(record.n_skipped for record in records.values())
    if any_skipped:
        columns += ["skipped steps"]
    for column in columns:
        table.add_column(Text(column), justify="right")
    for name, record in records.items():
        if _has_figures(record):
            table.add_row(name, *_cells(record), *([_skipped(record)] if any_skipped else []))
    return table


def _cells(record: StageRecord) -> list[str]:
    """Loss, exact match, size and time of a stage, each empty where the stage has none."""
    loss = "" if record.loss_nats is None else f"{record.loss_nats:.4f}"
    match = "" if record.exact_match is None else f"{record.exact_match:.1%} of {record.n_prompts}"
    sizes = (record.model_bytes, record.bytes, record.bytes_after)
    n_bytes = next((size for size in sizes if size is not None), None)
    size = "" if n_bytes is None else f"{n_bytes / 2**20:.2f}"
    return [loss, match, size, "" if record.time_s is None else f"{record.time_s:.1f}"]


def _skipped(record: StageRecord) -> str:
    return f"{record.n_skipped} of {record.steps}" if record.n_skipped else ""


def _samples(evals: Mapping[str, StageRecord]) -> Iterator[RenderableType]:
    kept: dict[str, tuple[Sample, ...]] = {name: record.samples for name, record in evals.items()}
    width = max(map(len, ("reference", *kept)))
    first = next(iter(kept.values()))
    for i, sample in enumerate(first):
        yield Text(f"{'prompt':{width}}  {sample.prompt}", style="bold")
        yield Text(f"{'reference':{width}}  {sample.reference}", style="green")
        for name, samples in kept.items():
            if i < len(samples) and samples[i].prompt == sample.prompt:
                yield Text(f"{name:{width}}  {samples[i].answer}")
        yield Text()
