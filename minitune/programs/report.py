"""Report of a finished run for a person: what it learned, how fast, in how much memory, and where the result lies."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minitune.programs.log import readings


def report(title: str, summary: Mapping[str, Any]) -> RenderableType:
    """Content of a summary.json as one table of stages, the evaluations' samples side by side, and a line of figures."""
    records = {name: record for name, record in summary.items() if isinstance(record, Mapping)}
    evals = {name: record for name, record in records.items() if "loss_nats" in record}
    parts: list[RenderableType] = [Text()]
    if any(_has_figures(record) for record in records.values()):
        parts += [_stages(title, records)]
    if evals:
        parts += _samples(evals)
    figures = {name: summary[name] for name in ("steps", "tokens_per_s", "peak_mem_bytes") if name in summary}
    parts += [Text(readings(figures))] if figures else []
    parts += [Text(f"{record['what']} in {record['path']}") for record in records.values() if "path" in record]
    return Group(*parts)


def _has_figures(record: Mapping[str, Any]) -> bool:
    return any(key in record for key in ("loss_nats", "steps", "bytes", "bytes_after"))


def _stages(title: str, records: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for column in ("loss [nats a token]", "exact match", "size [MiB]", "time [s]"):
        table.add_column(column, justify="right")
    for name, record in records.items():
        if not _has_figures(record):
            continue
        loss = f"{record['loss_nats']:.4f}" if "loss_nats" in record else ""
        match = f"{record['exact_match']:.1%} of {record['n_prompts']}" if "exact_match" in record else ""
        n_bytes = next((record[key] for key in ("model_bytes", "bytes", "bytes_after") if key in record), None)
        size = f"{n_bytes / 2**20:.2f}" if n_bytes is not None else ""
        table.add_row(name, loss, match, size, f"{record['time_s']:.1f}" if "time_s" in record else "")
    return table


def _samples(evals: Mapping[str, Mapping[str, Any]]) -> Iterator[RenderableType]:
    kept = {name: record.get("samples", []) for name, record in evals.items()}
    width = max(map(len, ("reference", *kept)))
    first = next(iter(kept.values()))
    for i, sample in enumerate(first):
        yield Text(f"{'prompt':{width}}  {sample['prompt']}", style="bold")
        yield Text(f"{'reference':{width}}  {sample['reference']}", style="green")
        for name, samples in kept.items():
            if i < len(samples) and samples[i]["prompt"] == sample["prompt"]:
                yield Text(f"{name:{width}}  {samples[i]['answer']}")
        yield Text()
