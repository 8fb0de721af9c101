"""Manifest of a run: its inputs with their hashes, and when, where and with what it was begun and
continued."""

import os
import platform
import socket
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec

from minitune import __version__
from minitune.io.json_file import read_json
from minitune.io.results import Record, file_record, hashed_record, iso_time
from minitune.programs import save_paths
from minitune.programs.program import Program, WrittenProgram
from minitune.programs.records import REMEDY
from minitune.programs.variables import to_store

FILE = "manifest.json"
PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "msgspec", "wandb")


class Start(msgspec.Struct, frozen=True):
    """When, where and with what a run was begun or continued."""

    time: str
    host: str
    pid: int
    versions: dict[str, str]


class Manifest(msgspec.Struct, frozen=True):
    """Inputs and origin of a run; inputs: by path, "sha256" and "bytes", or "bytes" and "time" for
    large weights; seq_len: of each data table, in numbers; variables: of the environment, those
    that the program's strings hold outside of [log], which is where tokens are."""

    seed: int
    inputs: dict[str, Record]
    starts: Annotated[tuple[Start, ...], msgspec.Meta(min_length=1)]
    seq_len: dict[str, int] = {}
    variables: dict[str, str] = {}


def manifest_of(asked: WrittenProgram, *starts: Start) -> Manifest:
    """Manifest of a program as its files are now, begun and continued at `starts`."""
    program = asked.program
    lengths = {name: source.max_seq_len for name, source in program.data.items()}
    variables = to_store(asked.written)
    return Manifest(program.seed, input_records(program), starts, lengths, variables)


def input_records(program: Program) -> dict[str, Record]:
    """Every file that the program reads, by the path that it writes: SHA-256 and size, or size and
    time for large weights."""
    records = {}
    for name, file, is_hashed in save_paths.input_files(program):
        records[name] = hashed_record(file) if is_hashed else file_record(file)
    return records


def this_start() -> Start:
    """Start of this process, now."""
    versions = {"minitune": __version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    now = iso_time(datetime.now(UTC).timestamp())
    return Start(now, socket.gethostname(), os.getpid(), versions)


def version_changes(before: Start, now: Start) -> str:
    """Versions that differ, in words; nothing if all are the same."""
    return ", ".join(
        f"{name} {before.versions.get(name)} -> {version}"
        for name, version in now.versions.items()
        if before.versions.get(name) != version
    )


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a run folder; InputError for one that no run wrote."""
    return read_json(folder / FILE, Manifest, "runs", REMEDY)
