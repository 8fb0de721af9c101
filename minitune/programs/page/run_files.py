"""Files of a run folder, read for a page: what was measured, and the program that was run."""

import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.programs.data_facts import DataFacts, read_facts
from minitune.programs.log import LINES
from minitune.programs.profiling.table import StageProfile, read_profiles
from minitune.programs.records import (
    StageRecord,
    read_records,
    read_rows,
    read_summary,
    stage_records,
)
from minitune.programs.variables import hidden

PROGRAM, MANIFEST, ROWS = "program.toml", "manifest.json", "metrics.jsonl"
SUMMARY, RECORDS = "summary.json", "records.json"
NOT_NUMBERS = ("stage", "step", "adapter")


class RunFiles(NamedTuple):
    """Content of a run folder."""

    folder: Path
    program_text: str
    program: Mapping[str, Any]  # decoded, its variables as they were written
    manifest: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]  # by stage
    rows: Mapping[str, Sequence[Mapping[str, Any]]]  # of metrics.jsonl, by stage
    lines: Sequence[str]  # of log.txt
    is_finished: bool
    facts: DataFacts | None = None  # on the data
    profiles: Mapping[str, StageProfile] = MappingProxyType({})  # by training stage

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.program.get("name", self.folder.name))

    @property
    def typed(self) -> dict[str, StageRecord]:
        """Figures of the stages that a report shows."""
        return stage_records(self.records, str(self.folder))


def read_run(folder: Path) -> RunFiles:
    """Content of a run folder, finished or not; InputError for a folder that is none."""
    if not (folder / PROGRAM).is_file():
        raise InputError(
            f"report: {folder} holds no {PROGRAM}, expected the folder of a run such as runs/lora; "
            "correct the path"
        )
    text = (folder / PROGRAM).read_text("utf-8", errors="replace")
    is_finished = (folder / SUMMARY).is_file()
    if is_finished:
        records = read_summary(folder / SUMMARY)
    else:
        records = read_records(folder / RECORDS) if (folder / RECORDS).is_file() else {}
    stages = {name: record for name, record in records.items() if isinstance(record, Mapping)}
    log = folder / LINES
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    program, manifest = _decoded(folder / PROGRAM, text), _manifest(folder / MANIFEST)
    variables, inputs = manifest.get("variables", {}), manifest.get("inputs", {})
    names = hidden(inputs, program, variables)
    manifest = {**manifest, "inputs": dict(zip(names, inputs.values(), strict=True))}
    return RunFiles(
        folder,
        text,
        program,
        manifest,
        stages,
        _rows(folder / ROWS),
        hidden(lines, program, variables),
        is_finished,
        read_facts(folder),
        read_profiles(folder),
    )


def _decoded(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"report: {path} is no TOML ({error}), expected a program") from None


def _manifest(path: Path) -> dict[str, Any]:
    """Content of manifest.json; nothing where there is none, or no JSON."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl by stage; what is not finite stands there as a text and is a number
    again."""
    by_stage: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for stage, step, line in read_rows(path):
        values = {
            name: _number(value)
            for name, value in json.loads(line).items()
            if name not in NOT_NUMBERS
        }
        numbers = {name: value for name, value in values.items() if value is not None}
        adapter = json.loads(line).get("adapter")
        by_stage[stage].append({"step": step, "adapter": adapter, **numbers})
    return dict(by_stage)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
