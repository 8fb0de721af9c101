"""Part of a page on where time and memory of recorded steps went."""

from collections.abc import Iterator, Mapping
from html import escape

from minitune.programs.page.parts import table
from minitune.programs.profiling.table import TITLES, StageProfile

LEGIBLE = 0.2  # share of the bar from which on its kind of work has room
HOW = (
    "Each moment counts once: for the innermost operator, or for the part of a step that it is in "
    "(attention, head and loss, optimizer), the backward of that part included."
)


def profile_parts(profiles: Mapping[str, StageProfile]) -> Iterator[str]:
    """Yield HTML of the profiles of a run, by training stage; nothing of a run without."""
    if profiles:
        yield "<h2>Where time and memory went</h2>"
    for label, profile in profiles.items():
        yield f"<p>{escape(label)}: {escape(profile.sentence())}.</p>"
        yield _bar(profile)
        yield table(TITLES, [line.cells for line in profile.kinds])
        yield f'<p class="dim">{escape(" ".join([_source(profile), HOW]))}</p>'
        files = [f"{profile.trace} opens in ui.perfetto.dev and in chrome://tracing"]
        if profile.snapshot is not None:
            files.append(f"{profile.snapshot} in pytorch.org/memory_viz")
        yield f'<p class="dim">{escape("; ".join(files))}</p>'


def _bar(profile: StageProfile) -> str:
    """Bar of the shares, in the order of the table."""
    parts = [
        f'<div title="{escape(line.kind)}: {line.share:.1%}" style="flex: {line.share:.4f} 0 0; '
        f'background: rgba(64, 128, 255, {0.5 - 0.4 * i / len(profile.kinds):.2f})">'
        f"{escape(line.kind) if line.share >= LEGIBLE else ''}</div>"
        for i, line in enumerate(profile.kinds)
    ]
    return f'<div class="shares">{"".join(parts)}</div>'


def _source(profile: StageProfile) -> str:
    where = "kernels of the device" if profile.of_device else "the thread that trains"
    return (
        f"Times are those of {where}. At the peak, {profile.peak_bytes / 2**20:,.0f} MiB that "
        "these steps allocated were there at once; what was there before is not counted."
    )
