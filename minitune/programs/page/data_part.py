"""Part of a page on data: figures of each table, histograms of lengths, and notes."""

from html import escape

from minitune.programs.data_facts import DataFacts, TableFacts
from minitune.programs.page.curves import histogram
from minitune.programs.page.parts import drawn, table

HEAD = (
    "",
    "samples",
    "tokens",
    "targets",
    "rows an epoch",
    "seq_len",
    "longest",
    "rows full to",
    "repeated",
)


def data_parts(facts: DataFacts) -> list[str]:
    """HTML of the facts on data, in its order on the page."""
    notes = [f"<li>{escape(note)}</li>" for note in facts.notes()]
    parts = ['<ul class="advice">', *notes, "</ul>"] if notes else []
    parts.append(table(HEAD, [_cells(name, one) for name, one in facts.tables.items()]))
    left_out = [
        f"{name}: {n:,} {reason}"
        for name, one in facts.tables.items()
        for reason, n in one.left_out.items()
    ]
    shared = [
        f"{one.n_equal:,} of the {one.n_samples:,} samples of {one.measured} stand in "
        f"{one.trained}, and {one.n_equal_prompts:,} have a prompt that stands there"
        for one in facts.overlaps
    ]
    parts += [f'<p class="dim">{escape(text)}</p>' for text in (*left_out, *shared)]
    figures = [
        histogram(f"Lengths of {name}", one.lengths.width, one.lengths.counts)
        for name, one in facts.tables.items()
    ]
    return [*parts, f'<div class="curves">{"".join(map(drawn, figures))}</div>']


def _cells(name: str, facts: TableFacts) -> list[str]:
    """Row of a table of tables."""
    return [
        name,
        f"{facts.n_samples:,}",
        f"{facts.n_tokens:,}",
        f"{facts.n_target_tokens / facts.n_tokens:.1%}",
        f"{facts.n_rows:,}",
        f"{facts.seq_len:,}",
        f"{facts.lengths.longest:,}",
        "" if facts.fill is None else f"{facts.fill:.1%}",
        "not compared" if facts.n_repeated is None else f"{facts.n_repeated:,}",
    ]
