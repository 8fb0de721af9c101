"""Places of data: files of the user's, of the demo, and data sets of the Hub.

A data set is fetched into the cache when it is first needed. `check`, which every run begins with,
asks the Hub whether there is a newer one; all that follows takes the files that are there.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from minitune.data.files import is_data_file
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.io import array_cache, paths
from minitune.io.atomic import write_atomic
from minitune.io.cache_size import HUB as FOLDER
from minitune.io.paths import locate
from minitune.io.units import format_bytes
from minitune.registry.hub_data import fetch_data
from minitune.registry.hub_splits import parsed

HUB = "hf:"


class FetchedSplit(NamedTuple):
    """Files of a split of the Hub, as they lie in the cache."""

    files: list[str]
    commit: str
    n_bytes: int


def located(source: Source) -> Source:
    """Source with its paths as places on this machine."""
    return source.with_paths(data_places)


def data_places(path: str) -> tuple[Path, ...]:
    """Places that a path to data means: the path's own, or the files of a data set of the Hub."""
    if not path.startswith(HUB):
        return (locate(path),)
    split = _cached(path) or _fetched(path)
    return tuple(map(Path, split.files))


def name_in_data_set(file: Path) -> str:
    """Name of a fetched file in its data set."""
    # CACHE/hub/OWNER--NAME/COMMIT/...
    return file.relative_to(paths.cache() / FOLDER).as_posix().split("/", 2)[-1]


def refreshed(names: Iterable[str]) -> list[str]:
    """Lines on the data sets of the Hub among paths to data, each brought to what the Hub has now.

    Without the network they are what was fetched last, and the line says so; InputError where that
    is nothing.
    """
    lines = []
    for path in sorted({path for path in names if path.startswith(HUB)}):
        before = _cached(path)
        try:
            split, note = _fetched(path), ""
        except InputError as error:
            if before is None:
                raise
            split, note = before, f", fetched earlier ({error})"
        counts = f"{len(split.files)} files, {format_bytes(split.n_bytes)}"
        lines.append(f"data: {path} at {split.commit[:12]}: {counts}{note}")
    return lines


def _fetched(path: str) -> FetchedSplit:
    """Fetch what of a split is not in the cache, and note what there is."""
    name = parsed(path)
    home = paths.cache() / FOLDER / name.repo.replace("/", "--")

    def tell(text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"{text}\n")

    found = fetch_data(name, home.joinpath, is_data_file, tell, "XDG_CACHE_HOME")
    split = FetchedSplit([str(file) for file in found.files], found.commit, found.n_bytes)
    write_atomic(_note(path), msgspec.json.encode(split))
    return split


def _cached(path: str) -> FetchedSplit | None:
    """Split as it was fetched last; None if it was not, or if a file of it is gone."""
    parsed(path)
    try:
        split = msgspec.json.decode(_note(path).read_bytes(), type=FetchedSplit)
    except (OSError, msgspec.MsgspecError):
        return None
    return split if all(Path(file).is_file() for file in split.files) else None


def _note(path: str) -> Path:
    """File that says what was fetched for a path, from the server that HF_ENDPOINT names."""
    name = array_cache.key(path, os.environ.get("HF_ENDPOINT", ""))
    return paths.cache() / FOLDER / f"{name}.json"
