"""TensorBoard: files of events in the run folder, which `tensorboard --logdir runs` shows."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.trackers.tracker import PROGRAM_FILE, Artifact, Histogram, Kept, StepValues, numbers


class TensorboardConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Place of the event files."""

    dir: str | None = None  # folder of the event files; tensorboard in the run folder if absent

    @property
    def artifacts(self) -> tuple[Kept, ...]:
        """Nothing: it keeps no folders."""
        return ()

    def check(self) -> None:
        """InputError if the package is missing."""
        _writer()

    def start(self, folder: Path, program: Mapping[str, Any]) -> "TensorboardRun":
        """Event files of the run, with the program as a text."""
        place = Path(self.dir) if self.dir else folder / "tensorboard"
        text = folder / PROGRAM_FILE
        return TensorboardRun(place, text.read_text("utf-8") if text.is_file() else "")


class TensorboardRun:
    """Event files of a run; what a continued run writes takes the place of later steps."""

    def __init__(self, folder: Path, program: str) -> None:
        """program: text of program.toml."""
        self._folder, self._program = folder, program
        self._open: Any = None  # from the first step on, which says where the run goes on

    def log(self, rows: Sequence[StepValues]) -> None:
        """Write rows as scalars."""
        writer = self._writer(rows[0].step)
        for step, values in rows:
            for name, value in numbers(values).items():
                writer.add_scalar(name, value, step)
        writer.flush()

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        """Write the numbers of a finished stage as LABEL/NAME, and its samples as texts."""
        writer = self._writer(step + 1)
        for name, value in numbers(record, f"{label}/").items():
            writer.add_scalar(name, value, step)
        for i, sample in enumerate(record.get("samples") or ()):
            text = json.dumps(sample, ensure_ascii=False, indent=2)
            writer.add_text(f"{label}/sample {i + 1}", f"```json\n{text}\n```", step)
        writer.flush()

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write histograms, with middles of their bins in place of sums that are not known."""
        writer = self._writer(step)
        for name, (counts, edges) in histograms.items():
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
                sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
                bucket_limits=list(edges[1:]),
                bucket_counts=list(counts),
                global_step=step,
            )

    def artifact(self, artifact: Artifact) -> None:
        """Nothing: TensorBoard keeps no files."""

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Nothing: the figures of all stages were written as they ended."""

    def finish(self, *, failed: bool) -> None:
        """Close the files."""
        if self._open is not None:
            self._open.close()

    def _writer(self, step: int) -> Any:
        if self._open is None:
            # Steps from here on, of a run that was killed after its last saved state, are dropped.
            self._open = _writer()(str(self._folder), purge_step=step)
            self._open.add_text("program", f"```toml\n{self._program}\n```")
        return self._open


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except ImportError:
        found = "the package tensorboard is not installed"
        raise InputError(
            f"log: {found}, expected it for [log] tensorboard; pip install 'minitune[tensorboard]'"
        ) from None
    return SummaryWriter
