"""Files of a run folder as typed values: what was measured, and the rows of the log, decoded here
and nowhere else."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from minitune.errors import InputError
from minitune.io.atomic import write_atomic
from minitune.io.json_file import read_json
from minitune.io.results import Record

MUCH_LOST = (
    0.2  # share of a weight's change that rounding may take before a run ends with a warning
)
REMEDY = "set resume = false to begin afresh"


class Sample(msgspec.Struct, frozen=True):
    """Answer that a report shows beside its reference."""

    prompt: Any  # text, or content parts
    reference: str
    answer: str


class Metric(msgspec.Struct, frozen=True):
    """Value of one metric of a task."""

    value: float | None = None


class TaskRecord(msgspec.Struct, frozen=True):
    """Metrics of a task of the harness, by name."""

    metrics: dict[str, Metric] = {}


class OtherAnswers(msgspec.Struct, frozen=True):
    """Answers of the state of training that did not go on to the stages after it."""

    state: Literal["best", "last"]
    step: int
    samples: tuple[Sample, ...]


class StageRecord(msgspec.Struct, frozen=True):
    """Figures of a stage's record that a report shows or a later start reads; a record may hold
    others."""

    top: dict[str, float | int | None] = {}  # what summary.json has at its top level
    loss_nats: float | None = None
    exact_match: float | None = None
    n_prompts: int | None = None
    samples: tuple[Sample, ...] = ()
    other_answers: OtherAnswers | None = None
    steps: int | None = None
    last_loss: float | None = None  # nats a token, of training
    mean_loss: float | None = None  # of the last n_mean_steps
    n_mean_steps: int | None = None
    # share of pairs whose preferred answer has the higher reward
    reward_accuracy: float | None = None
    best_heldout_nats: float | None = None
    best_step: int | None = None
    ended_at_step: int | None = None
    planned_steps: int | None = None
    n_skipped: int | None = None
    time_s: float | None = None
    bytes: int | None = None
    bytes_after: int | None = None
    model_bytes: int | None = None
    tasks: dict[str, TaskRecord] = {}  # of the harness, by name
    what: str | None = None
    path: str | None = None
    merge_error: float | None = None  # largest share of a weight's change that was lost
    onto: str | None = None  # what was merged onto, where the deltas trained over quantized weights


class RowKey(msgspec.Struct, frozen=True):
    """Place of a row of metrics.jsonl in its run."""

    stage: str
    step: int


def rounding_warning(name: str, merge_error: float | None, onto: str | None) -> str | None:
    """Sentence on a merge whose rounding lost much of what was trained, or None.

    Onto the stored weights, what is lost is a distance between two bases and no rounding.
    """
    if merge_error is None or merge_error <= MUCH_LOST or onto == "stored":
        return None
    lost = f"rounding lost up to {merge_error:.0%} of a weight's change"
    return f"{name}: {lost}; {name}.dtype=float32 keeps all of it, as does serving the adapter"


def summary(records: Mapping[str, Record]) -> Record:
    """Records by stage name, with what stands under their key "top" moved to the top level."""
    stages, top = {}, {}
    for name, record in records.items():
        stages[name] = {key: value for key, value in record.items() if key != "top"}
        top |= record.get("top", {})
    return stages | top


def stage_records(tree: Mapping[str, Any], path: str) -> dict[str, StageRecord]:
    """Typed records of the stages in a summary or in records.json, by name.

    InputError, which names `path`, for a record whose figures are of another type.
    """
    typed = {}
    for name, record in tree.items():
        if isinstance(record, Mapping):
            try:
                typed[name] = msgspec.convert(record, StageRecord)
            except (ValueError, msgspec.ValidationError) as error:
                found = f"holds for stage {name[:100]} what no stage wrote ({error})"
                message = f"records: {path} {found}, expected its figures; {REMEDY}"
                raise InputError(message) from None
    return typed


def read_records(path: Path) -> dict[str, Record]:
    """Records of finished stages from records.json; InputError for a file that no run wrote."""
    records = read_json(path, dict[str, Record], "runs", REMEDY)
    stage_records(records, str(path))
    return records


def read_summary(path: Path) -> Record:
    """Content of summary.json; InputError for a file that no run wrote."""
    content = read_json(path, Record, "runs", REMEDY)
    stage_records(content, str(path))
    return content


def read_rows(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(stage, step, line) of each whole row of metrics.jsonl; a line that is no row is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            key = msgspec.json.decode(line, type=RowKey)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if line.endswith(b"\n"):
            yield key.stage, key.step, line


def write_record(path: Path, tree: Mapping[str, Any] | msgspec.Struct) -> None:
    """Write a record as indented JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
