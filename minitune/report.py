"""What a finished run shows a person: what it learned, how fast, in how much memory, and where the result lies."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minitune.log import readings


def report(title: str, summary: Mapping[str, Any]) -> RenderableType:
    """The content of a summary.json as one table of evaluations, their sample answers side by side, and a line of figures."""
    evals = {name: record for name, record in summary.items() if isinstance(record, Mapping) and "loss_nats" in record}
    parts: list[RenderableType] = [Text()]
    if evals:
        parts += [_evaluations(title, evals), *_samples(evals)]
    figures = {name: summary[name] for name in ("steps", "tokens_per_s", "peak_mem_bytes") if name in summary}
    parts += [Text(readings(figures))] if figures else []
    saved = [record for record in summary.values() if isinstance(record, Mapping) and "path" in record]
    parts += [Text(f"{record['what']} in {record['path']}") for record in saved]
    return Group(*parts)


def _evaluations(title: str, evals: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("evaluation")
    table.add_column("loss [nats a token]", justify="right")
    table.add_column("exact match", justify="right")
    for name, record in evals.items():
        match = f"{record['exact_match']:.1%} of {record['n_prompts']}" if "exact_match" in record else "-"
        table.add_row(name, f"{record['loss_nats']:.4f}", match)
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
