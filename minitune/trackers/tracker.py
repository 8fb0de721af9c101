"""Interface of trackers: rows of training, figures of stages, histograms and files of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

PROGRAM_FILE = "program.toml"  # of a run folder
# By these a run folder knows its run at a tracker, to continue it.
WANDB_ID, MLFLOW_ID, TRACKIO_STEP = "wandb-id", "mlflow-id", "trackio-step"
TRACKER_FILES = (WANDB_ID, MLFLOW_ID, TRACKIO_STEP)

# What of a run a tracker keeps as an artifact once it is written.
Kept = Literal["deltas", "merged", "params", "checkpoints"]
Scalar = float | int | str


class StepValues(NamedTuple):
    """Values of one optimizer step; steps count from 1 over all training stages of a program."""

    step: int
    values: Mapping[str, Scalar]


class Histogram(NamedTuple):
    """Counts of values between edges, of which there is one more."""

    counts: Sequence[float]
    edges: Sequence[float]


class Artifact(NamedTuple):
    """Folder or file that a run has written, as trackers keep it."""

    name: str
    path: Path
    metadata: Mapping[str, Any]
    is_best: bool  # of the evaluations of its training


@runtime_checkable
class Tracker(Protocol):
    """Receiver of what a run measures.

    Every method may raise: the run then goes on without the tracker, and says why. The methods are
    called from a thread of their own, one after the other.
    """

    def log(self, rows: Sequence[StepValues]) -> None:
        """Take rows of training in the order of their steps; a step that is there already is left
        as it is."""
        ...

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        """Take the figures and samples of a stage that has ended."""
        ...

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Take histograms by name, such as gradients/model.layers.0.mlp.down_proj.weight.a."""
        ...

    def artifact(self, artifact: Artifact) -> None:
        """Keep a folder or a file with what is known of it."""
        ...

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Take the content of summary.json."""
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run, with all that was taken stored."""
        ...


@runtime_checkable
class TrackerConfig(Protocol):
    """Settings of a tracker in a program's [log]."""

    @property
    def artifacts(self) -> Sequence[Kept]:
        """Kinds of what is to be kept as an artifact."""
        ...

    def check(self) -> None:
        """InputError for what would stop the tracker at the beginning of a run."""
        ...

    def start(self, folder: Path, program: Mapping[str, Any]) -> Tracker:
        """Tracker of the run in a folder, continued if the folder says so; program: the resolved
        one. InputError with the tracker's own words if it does not begin."""
        ...


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Numbers and texts of a nested record by their path, "after/loss_nats"; lists are left out."""
    values: dict[str, Scalar] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, float | int | str):
            values[f"{prefix}{key}"] = value
    return values


def numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers alone of a nested record, by their path."""
    values = flat(tree, prefix)
    return {name: float(value) for name, value in values.items() if not isinstance(value, str)}
