"""Versions of registered models: the interface of registries, and what tells one content from
another."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from minitune.errors import InputError, nearest
from minitune.io.checksums import checksum

LATEST = "latest"  # alias of the newest version, which every registry has
CONTENT, FACTS = "minitune.sha256", "minitune.json"
SHOWN = 12  # versions and aliases that a message names


class Version(NamedTuple):
    """Version of a registered model."""

    number: str
    content: str | None  # hash of its files, where the registry knows it
    place: str  # by which the registry fetches it


class Facts(NamedTuple):
    """Knowledge of a model that is registered."""

    text: str  # a sentence or a card on it
    table: Mapping[str, Any]  # program, seed, base, hashes, evaluation

    @property
    def tags(self) -> dict[str, str]:
        """Entries of the table that fit into short texts."""
        short = {name: self.table[name] for name in ("seed", "base") if name in self.table}
        figures = self.table.get("evaluation", {})
        return {name: str(value) for name, value in {**short, **figures}.items()}


@runtime_checkable
class Registry(Protocol):
    """Registry of models. Every method raises InputError for a package, network or right that is
    missing."""

    def check(self, name: str) -> None:
        """InputError for what would stop a new version."""
        ...

    def versions(self, name: str) -> Sequence[Version]:
        """Versions of a model, the newest last; none of a model that is not there."""
        ...

    def find(self, name: str, wanted: str) -> Version:
        """Version of a number or an alias."""
        ...

    def set_alias(self, name: str, alias: str, version: Version) -> None:
        """Have an alias name a version, and no other one."""
        ...

    def fetch(self, name: str, version: Version, folder: Path, tell: Callable[[str], None]) -> Path:
        """Folder of a version's files: the one that is given, filled, or where they lie already."""
        ...


@runtime_checkable
class Store(Registry, Protocol):
    """Registry that takes files as they are, and knows a version by the hash of them."""

    def add(self, name: str, place: Path, content: str, facts: Facts) -> Version:
        """New version with the files at a place."""
        ...


def files_at(place: Path) -> dict[str, Path]:
    """Files of a folder by their names in it, without hidden ones; or the one file."""
    if place.is_file():
        return {place.name: place}
    files = {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def only_folder(folder: Path) -> Path:
    """Folder with the files, where a registry has laid it into others that hold nothing else."""
    inner = list(folder.iterdir())
    while len(inner) == 1 and inner[0].is_dir():
        folder = inner[0]
        inner = list(folder.iterdir())
    return folder


def content_hash(place: Path) -> str:
    """SHA-256 of the names and bytes of all files at a place."""
    digests = [[name, checksum(path).sha256] for name, path in files_at(place).items()]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def absent(name: str, wanted: str, known: Iterable[str]) -> InputError:
    """Message on a version that a registered model does not have."""
    names = list(known)
    if not names:
        found = f"registry: {name} has no version"
        return InputError(f"{found}, expected one; `minitune register FOLDER {name}` makes it")
    shown = ", ".join(names[-SHOWN:])
    remedy = nearest(wanted, names) or "; correct it"
    return InputError(
        f"registry: {name} has no version {wanted!r}, expected one of {shown}{remedy}"
    )
