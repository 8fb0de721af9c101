"""Page of a run, or of several: one HTML file that opens without a network."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minitune.io.units import format_bytes
from minitune.programs.page.advice import advice
from minitune.programs.page.compare import Outcome, adapters, differences, grid
from minitune.programs.page.curves import heat_map, library, pictures
from minitune.programs.page.data_part import data_parts
from minitune.programs.page.parts import drawn, table
from minitune.programs.page.profile_part import profile_parts
from minitune.programs.page.run_files import RunFiles
from minitune.programs.page.samples_part import samples_parts
from minitune.programs.records import StageRecord

FILE = "report.html"
DRAW = """
for (const place of document.querySelectorAll(".plot")) {
  const { traces, layout } = JSON.parse(place.dataset.figure);
  Plotly.newPlot(place, traces, layout, { responsive: true, displayModeBar: false });
}
"""
PROGRESS_LINE = re.compile(r"\S+ [\d,]+/[\d,]+ ")
DATA_LINE = re.compile(
    r"\b(samples|tokens|rows|epoch|dropped|duplicate|truncated|cut)\b", re.IGNORECASE
)
STYLE = """
:root { color-scheme: light dark; --line: rgba(128, 128, 128, .3);
        --good: rgba(40, 167, 69, .25); --warn: rgba(255, 170, 0, .18); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.curves { display: grid; gap: .5rem;
          grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.plot, .sample, pre { border: 1px solid var(--line); border-radius: 6px; }
.plot { min-width: 0; overflow: hidden; }
.wide, pre { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right;
         vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.sample { margin-bottom: .6rem; }
.sample table { width: 100%; }
.sample td { overflow-wrap: anywhere; text-align: left; white-space: pre-wrap; }
.sample td:first-child { opacity: .7; white-space: nowrap; width: 6rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); }
.answers div { padding: .3rem .7rem; }
.answers p { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
mark { background: var(--warn); color: inherit; }
del { opacity: .55; }
.same { background: var(--good); }
.advice { padding: 0; }
.advice li { background: var(--warn); border-radius: 6px; list-style: none; margin: .3rem 0;
             padding: .4rem .7rem; }
pre { padding: .7rem; }
summary { cursor: pointer; }
.shares { display: flex; gap: 1px; height: 1.9rem; margin: .3rem 0 .6rem; }
.shares div { overflow: hidden; padding: .2rem .4rem;
              text-overflow: ellipsis; white-space: nowrap; }
.dim { opacity: .7; }
"""
FIGURES = (  # columns of the table of stages: title, value of a record, how it is written
    (
        "loss [nats]",
        lambda one: one.loss_nats if one.loss_nats is not None else one.mean_loss,
        ".4f",
    ),
    ("best held-out", lambda one: one.best_heldout_nats, ".4f"),
    ("at step", lambda one: one.best_step, "d"),
    ("exact match", lambda one: one.exact_match, ".1%"),
    ("reward accuracy", lambda one: one.reward_accuracy, ".1%"),
    ("steps", lambda one: one.steps, ",d"),
    ("skipped", lambda one: one.n_skipped or None, ",d"),
    ("time [s]", lambda one: one.time_s, ",.1f"),
)


def write_page(run: RunFiles) -> Path:
    """Write report.html into a run's folder and return its path."""
    path = run.folder / FILE
    path.write_text(page({run.name: run}), encoding="utf-8")
    return path


def page(runs: Mapping[str, RunFiles], *, script: str | None = None, refresh_s: int = 0) -> str:
    """HTML of a run, or of several beside each other, by their label.

    script: address of plotly's JavaScript, which the page holds itself if absent. refresh_s:
    seconds after which a browser loads the page again; 0: never.
    """
    title = " beside ".join(runs)
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        parts += _comparison(differences(runs), "What differs")
    for label, run in runs.items():
        parts += [f"<h2>{escape(label)}</h2>"] if len(runs) > 1 else []
        parts += _head(run)
        parts += _advice(run)
    curves = "".join(map(drawn, pictures(runs)))
    parts += ["<h2>Curves</h2>", f'<div class="curves">{curves}</div>'] if curves else []
    for label, run in runs.items():
        parts += [f"<h2>{escape(label)}</h2>"] if len(runs) > 1 else []
        parts += [*_stages(run.typed), *_sweeps(run), *samples_parts(run.typed)]
        parts += [*profile_parts(run.profiles), *_data(run), *_program(run)]
    body = "\n".join(parts)
    code = f'<script src="{escape(script)}">' if script else f"<script>{library()}"
    again = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{code}</script></head>"
        f"<body>\n{body}\n<script>{DRAW}</script></body></html>\n"
    )


def _head(run: RunFiles) -> list[str]:
    """State of a run in a line: where it lies, with what it was made, whether it is finished."""
    starts = run.manifest.get("starts") or [{}]
    versions = ", ".join(
        f"{name} {version}" for name, version in starts[-1].get("versions", {}).items()
    )
    state = "finished" if run.is_finished else "not finished"
    begun = starts[0].get("time", "")
    words = [str(run.folder), state, f"begun {begun}" if begun else "", versions]
    return [f'<p class="dim">{escape("; ".join(word for word in words if word))}</p>']


def _advice(run: RunFiles) -> list[str]:
    found = advice(run)
    if not found:
        return []
    return ['<ul class="advice">', *(f"<li>{escape(text)}</li>" for text in found), "</ul>"]


def _stages(records: Mapping[str, StageRecord]) -> list[str]:
    """Table of the stages with the figures that at least one of them has."""
    head, rows = stage_table(records)
    if not rows:
        return []
    written = [f"{one.what} in {one.path}" for one in records.values() if one.path]
    notes = [f'<p class="dim">{escape(text)}</p>' for text in written]
    return ["<h2>Stages</h2>", table(head, rows), *notes]


def stage_table(records: Mapping[str, StageRecord]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of the stages with figures, without the columns that none of them has."""
    texts = {
        name: [_cell(value(record), how) for _, value, how in FIGURES]
        for name, record in records.items()
    }
    shown = [i for i in range(len(FIGURES)) if any(cells[i] for cells in texts.values())]
    head = ["stage", *(FIGURES[i][0] for i in shown)]
    named = {name: [cells[i] for i in shown] for name, cells in texts.items()}
    return head, [[name, *cells] for name, cells in named.items() if any(cells)]


def _cell(value: float | int | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _comparison(outcomes: Sequence[Outcome], title: str) -> list[str]:
    """Table of outcomes, the best first, and a map where they differ in two keys."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.changed))
    ranked = sorted(outcomes, key=lambda one: (one.heldout_nats is None, one.heldout_nats))
    rows = [
        [
            one.label,
            *(_text(one.changed.get(key)) for key in keys),
            _cell(one.heldout_nats, ".4f"),
            _cell(one.step, "d"),
        ]
        for one in ranked
    ]
    parts = [f"<h2>{escape(title)}</h2>", table(["", *keys, "best loss [nats]", "at step"], rows)]
    mapped = grid(list(outcomes))
    if mapped is not None:
        axes, values = mapped
        parts.append(drawn(heat_map("Best loss", axes, values)))
    return parts


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _sweeps(run: RunFiles) -> Iterator[str]:
    for name, record in run.records.items():
        outcomes = adapters(record)
        if outcomes:
            yield from _comparison(outcomes, f"{name}: adapters of the sweep")


def _data(run: RunFiles) -> list[str]:
    """Lines of the log on the data, and the files that were read."""
    lines = data_lines(run)
    inputs = run.manifest.get("inputs") or {}
    files = [
        f"{name}: {format_bytes(entry['bytes'])}, sha256 {str(entry.get('sha256', 'none'))[:16]}"
        for name, entry in inputs.items()
        if isinstance(entry, Mapping) and "bytes" in entry
    ]
    parts = ["<h2>Data and inputs</h2>", *(data_parts(run.facts) if run.facts else [])]
    if lines:
        parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>")
    if files:
        listed = escape("\n".join(files))
        parts.append(
            f"<details><summary>files that were read</summary><pre>{listed}</pre></details>"
        )
    return parts if len(parts) > 1 else []


def data_lines(run: RunFiles) -> list[str]:
    """Lines of the log on the data: rows, tokens, targets, what was dropped or cut."""
    return [
        line
        for line in dict.fromkeys(run.lines)
        if DATA_LINE.search(line) and not PROGRESS_LINE.match(line) and not line.startswith("---")
    ]


def _program(run: RunFiles) -> list[str]:
    text = escape(run.program_text)
    return [f"<details><summary>program.toml</summary><pre>{text}</pre></details>"]
