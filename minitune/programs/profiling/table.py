"""Table of a profile: where time and memory went, by kind of work."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from minitune.io.json_file import read_json
from minitune.programs.profiling.trace import Measured
from minitune.programs.records import write_record

FILE = "profile.json"
FOLDER = "profile"  # of traces and snapshots
TITLES = ("kind of work", "time [s]", "share", "calls", "allocated [MiB]", "at the peak [MiB]")
N_NARROW = 3  # columns on a terminal that has no room for all
NAMED = 0.05  # share of the time from which on a kind of work is named in the sentence


class KindOfWork(msgspec.Struct, frozen=True):
    """Line of the table."""

    kind: str
    time_s: float  # of its own, without what it calls
    share: float  # of the time of all recorded steps
    calls: int
    allocated_bytes: int  # in all, be it given back or not
    peak_bytes: int  # that it has at the moment at which most is allocated

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts under TITLES."""
        calls = f"{self.calls:,}" if self.calls else ""
        numbers = f"{self.time_s:,.4f}", f"{self.share:.1%}", calls
        sizes = (self.allocated_bytes, self.peak_bytes)
        return (self.kind, *numbers, *(f"{size / 2**20:,.1f}" for size in sizes))


class StageProfile(msgspec.Struct, frozen=True):
    """Profile of one training stage."""

    steps: tuple[int, int]  # the first and the last one
    time_s: float  # from the begin of the first to the end of the last
    of_device: bool  # times are those of an accelerator's kernels, else of the thread that trains
    peak_bytes: int  # allocated in these steps and there at once
    kinds: tuple[KindOfWork, ...]  # by time, the longest first
    trace: str  # file in the run folder that chrome://tracing and Perfetto open
    snapshot: str | None = None  # file of CUDA's allocator, which pytorch.org/memory_viz opens

    def sentence(self) -> str:
        """Words for the time that the steps took, and where most of it went."""
        first, last = self.steps
        n = last - first + 1
        of_all = f"step {first} took" if n == 1 else f"steps {first} to {last} took"
        each = "" if n == 1 else f", {self.time_s / n:.3g} s each"
        named = [one for one in self.kinds if one.share >= NAMED]
        parts = [f"{one.share:.0%} of it is {one.kind}" for one in named[:1]]
        parts += [f"{one.share:.0%} {one.kind}" for one in named[1:]]
        rest = 1.0 - sum(one.share for one in named)
        parts += [f"{rest:.0%} the rest"] if rest >= 0.005 else []
        listed = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
        return f"{of_all} {self.time_s:.3g} s{each}: {listed}"


def stage_profile(
    measured: Measured, steps: tuple[int, int], trace: str, snapshot: str | None
) -> StageProfile:
    """Profile of a stage from what its trace holds."""
    total = measured.time_us
    lines = [
        KindOfWork(
            kind,
            one.time_us / 1e6,
            one.time_us / total,
            one.calls,
            one.allocated_bytes,
            one.peak_bytes,
        )
        for kind, one in measured.work.items()
    ]
    lines.sort(key=lambda line: -line.time_s)
    shown = tuple(line for line in lines if line.time_s > 0 or line.allocated_bytes > 0)
    of_device, peak_bytes = measured.is_of_device, measured.peak_bytes
    return StageProfile(steps, total / 1e6, of_device, peak_bytes, shown, trace, snapshot)


def drawn_table(label: str, profile: StageProfile, width: int) -> Table:
    """Table for a terminal of so many characters; a narrow one has times alone."""
    first, last = profile.steps
    where = "device" if profile.of_device else "processor"
    rows = [TITLES, *(line.cells for line in profile.kinds)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    n_columns = len(TITLES) if sum(widths) + 3 * len(TITLES) + 1 <= width else N_NARROW
    title = f"{label}: time of the {where} in steps {first} to {last}"
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(TITLES[:n_columns]):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=i > 0)
    for cells in rows[1:]:
        table.add_row(*cells[:n_columns])
    return table


def read_profiles(folder: Path) -> dict[str, StageProfile]:
    """Profiles in a run folder, by training stage; none without the file."""
    path = folder / FILE
    if not path.is_file():
        return {}
    return read_json(path, dict[str, StageProfile], "profile", "remove it")


def take_over(old: Path, new: Path, labels: Collection[str]) -> None:
    """Copy the profiles of some stages, with their files, from one run folder to another."""
    for label, profile in read_profiles(old).items():
        if label in labels:
            write_profile(new, label, profile)
            for name in filter(None, (profile.trace, profile.snapshot)):
                if (old / name).is_file():
                    (new / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(old / name, new / name)


def write_profile(folder: Path, label: str, profile: StageProfile) -> None:
    """Add the profile of a stage to those of a run folder, in the place of an earlier one."""
    profiles: Mapping[str, StageProfile] = {**read_profiles(folder), label: profile}
    write_record(folder / FILE, msgspec.to_builtins(profiles))
