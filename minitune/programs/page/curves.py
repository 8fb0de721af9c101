"""Curves of runs, drawn by plotly: losses, rates, norms, speed, memory, and maps of sweeps."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.programs.page.run_files import RunFiles

Points = tuple[list[float], list[float]]
GREY = "rgba(128, 128, 128, 0.25)"  # lines of a grid that show on white and on black
TEXT = "#808890"
# metrics that share a picture -> (its title, the unit of its axis)
PICTURES: dict[tuple[str, ...], tuple[str, str]] = {
    ("loss", "heldout_loss"): ("Loss", "nats"),
    ("reward_accuracy",): ("Reward accuracy", "share of pairs"),
    ("reward_margin", "reward_chosen", "reward_rejected"): ("Rewards", "nats"),
    ("lr",): ("Learning rate", ""),
    ("grad_norm",): ("Gradient norm", ""),
    ("tokens_per_second",): ("Speed", "tokens a second"),
    ("mem_bytes",): ("Memory", "GiB"),
}
SCALES = {"mem_bytes": 2.0**-30}
SPARSE = ("heldout_loss",)  # measured at some steps alone: drawn with their points


class Figure(NamedTuple):
    """Picture as plotly's JavaScript takes it."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]


class Line(NamedTuple):
    """One curve of a picture."""

    label: str
    metric: str
    points: Points


def pictures(runs: Mapping[str, RunFiles]) -> list[Figure]:
    """Picture for each kind of metric that the runs have; runs: by their label."""
    found = []
    for metrics, (title, unit) in PICTURES.items():
        lines = [line for metric in metrics for line in _lines(runs, metric)]
        if lines:
            found.append(_curves(lines, title, unit))
    return found


def histogram(title: str, width: int, counts: Sequence[int]) -> Figure:
    """Bars of how many documents have up to so many tokens; width: of a bar."""
    middles = [(i + 0.5) * width for i in range(len(counts))]
    spans = [f"{i * width + 1:,} to {(i + 1) * width:,} tokens" for i in range(len(counts))]
    trace = {"type": "bar", "x": middles, "y": list(counts), "hovertext": spans, "width": width}
    layout = {
        "xaxis": {"title": {"text": "tokens"}, "gridcolor": GREY, "zerolinecolor": GREY},
        "yaxis": {"title": {"text": "documents"}, "gridcolor": GREY, "zerolinecolor": GREY},
    }
    return Figure([trace], {**_looks(title), **layout})


def heat_map(title: str, axes: tuple[str, str], values: Mapping[tuple[Any, Any], float]) -> Figure:
    """Map of losses over two keys; lower is better."""
    columns = sorted({x for x, _ in values}, key=_order)
    rows = sorted({y for _, y in values}, key=_order)
    trace = {
        "type": "heatmap",
        "x": [str(x) for x in columns],
        "y": [str(y) for y in rows],
        "z": [[_finite(values.get((x, y))) for x in columns] for y in rows],
        "colorscale": "Viridis",
        "reversescale": True,
        "texttemplate": "%{z:.4f}",
        "colorbar": {"title": {"text": "nats"}},
    }
    titles = zip(("xaxis", "yaxis"), axes, strict=True)
    layout = {axis: {"type": "category", "title": {"text": key}} for axis, key in titles}
    return Figure([trace], {**_looks(title), **layout})


def library() -> str:
    """JavaScript of plotly, which a page holds so that it opens without a network."""
    try:
        place = resources.files("plotly") / "package_data/plotly.min.js"
    except ModuleNotFoundError:
        found = "the package plotly is not installed"
        raise InputError(
            f"report: {found}, expected it for a page with curves; pip install 'minitune[report]'"
        ) from None
    return place.read_text("utf-8")


def _lines(runs: Mapping[str, RunFiles], metric: str) -> Iterator[Line]:
    """Yield a curve for each run, training stage and adapter that has the metric."""
    for label, run in runs.items():
        for stage, rows in run.rows.items():
            by_adapter: defaultdict[Any, Points] = defaultdict(lambda: ([], []))
            for row in rows:
                if metric in row:
                    steps, values = by_adapter[row["adapter"]]
                    steps.append(row["step"])
                    values.append(row[metric] * SCALES.get(metric, 1.0))
            for number, points in by_adapter.items():
                parts = [label] if len(runs) > 1 else []
                parts += [stage] if len(run.rows) > 1 else []
                parts += [f"adapter {number}"] if number is not None else []
                yield Line(" ".join(parts), metric, points)


def _curves(lines: Sequence[Line], title: str, unit: str) -> Figure:
    has_several_metrics = len({line.metric for line in lines}) > 1
    traces = []
    for label, metric, (steps, values) in lines:
        words = [metric] if has_several_metrics or not label else []
        is_sparse = metric in SPARSE or len(steps) == 1
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if is_sparse else "lines",
                "name": " ".join([label, *words]).strip(),
                "x": steps,
                "y": [_finite(value) for value in values],
            }
        )
    layout = {
        "xaxis": {"title": {"text": "step"}, "gridcolor": GREY, "zerolinecolor": GREY},
        "yaxis": {"title": {"text": unit}, "gridcolor": GREY, "zerolinecolor": GREY},
        "showlegend": len(lines) > 1,
        "legend": {"orientation": "h", "y": -0.25},
    }
    return Figure(traces, {**_looks(title), **layout})


def _looks(title: str) -> dict[str, Any]:
    """Parts of a layout that fit a light and a dark page."""
    clear = "rgba(0, 0, 0, 0)"
    return {
        "title": {"text": title, "x": 0.02},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"color": TEXT, "family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 60, "r": 20, "t": 45, "b": 45},
        "height": 320,
    }


def _finite(value: float | None) -> float | None:
    """Value that JSON has a word for: a gap in the curve where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _order(value: Any) -> tuple[bool, Any]:
    """Order of the values of a key: numbers by size, before texts."""
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else str(value))
