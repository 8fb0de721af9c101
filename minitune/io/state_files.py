"""Files of a training state, and which part of which tensor each holds; without torch, so that
`inspect` stays fast.

One process writes state.safetensors. Several write state-00001-of-00004.safetensors and so on, and
the header of each says where its parts lie in the whole tensors.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

from minitune.io.safetensors_header import BITS, Entry, UInt63, read_header, read_metadata

META = "state.json"
SINGLE = "state.safetensors"
OF_MANY = re.compile(r"state-(\d{5,9})-of-(\d{5,9})\.safetensors")
PARTS = "parts"  # key of the metadata in a header


class Region(NamedTuple):
    """Part of a tensor: its first element and its size along each dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


class StoredPart(NamedTuple):
    """Part of a tensor in a file."""

    file: Path
    entry: Entry
    whole: tuple[int, ...]  # shape of the tensor
    offset: tuple[int, ...]

    @property
    def region(self) -> Region:
        """Part of the tensor that this is."""
        return Region(self.offset, self.entry.shape)


class _Place(msgspec.Struct):
    shape: tuple[UInt63, ...]  # of the whole tensor
    offset: tuple[UInt63, ...]


def tensor_file(i: int, n: int) -> str:
    """Name of file i of n."""
    return SINGLE if n == 1 else f"state-{i + 1:05d}-of-{n:05d}.safetensors"


def is_state_file(name: str) -> bool:
    """True for the name of a file that a training state may have."""
    return name in (META, SINGLE) or OF_MANY.fullmatch(name) is not None


def tensor_files(folder: Path) -> list[Path]:
    """Files of tensors that a state's folder holds, in their order; none in another folder."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = folder.glob("state-*.safetensors")
    return sorted(file for file in files if OF_MANY.fullmatch(file.name))


def missing_file(files: Sequence[Path]) -> Path | None:
    """First file that is not among those of a state, by the number of files in their names."""
    numbers = OF_MANY.fullmatch(files[-1].name)
    n = 1 if numbers is None else int(numbers[2])
    for i, file in enumerate(files):
        if file.name != tensor_file(i, n):
            return file.with_name(tensor_file(i, n))
    return None if len(files) == n else files[0].with_name(tensor_file(len(files), n))


def parts_metadata(
    places: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> dict[str, str]:
    """Metadata of a header that say of each part (shape of the whole tensor, offset)."""
    content = {name: _Place(*place) for name, place in places.items()}
    return {PARTS: msgspec.json.encode(content).decode()}


def read_parts(files: Iterable[Path]) -> dict[str, list[StoredPart]]:
    """Parts of every tensor, by its name. ValueError, which begins with the file and the tensor,
    for a header that is damaged, and where parts are missing, twice there or of several tensors.
    """
    stored: dict[str, list[StoredPart]] = {}
    for file in files:
        try:
            entries = read_header(file)
            text = read_metadata(file).get(PARTS)
            places = {} if text is None else msgspec.json.decode(text, type=dict[str, _Place])
            if text is None:
                places = {name: _whole(entry) for name, entry in entries.items()}
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error})") from None
        if unmatched := sorted(set(entries) ^ set(places)):
            raise ValueError(f"{file} says no place of {unmatched[0]}, or holds no such tensor")
        for name, entry in entries.items():
            part = StoredPart(file, entry, places[name].shape, places[name].offset)
            stored.setdefault(name, []).append(part)
    for name, parts in stored.items():
        _require_whole(name, parts)
    return stored


def whole_entries(stored: Mapping[str, Sequence[StoredPart]]) -> dict[str, Entry]:
    """Tensors as if one file held them, each at its byte 0."""
    wholes = {}
    for name, (first, *_) in stored.items():
        n_bytes = BITS[first.entry.dtype] * prod(first.whole) // 8
        wholes[name] = Entry(first.entry.dtype, first.whole, 0, n_bytes)
    return wholes


def _whole(entry: Entry) -> _Place:
    return _Place(entry.shape, (0,) * len(entry.shape))


def _require_whole(name: str, parts: Sequence[StoredPart]) -> None:
    """ValueError if the parts of a tensor are not those of a grid that covers it, each once."""
    first = parts[0]
    for part in parts:
        ends = tuple(start + n for start, n in zip(part.offset, part.entry.shape, strict=False))
        is_inside = len(part.offset) == len(part.entry.shape) == len(part.whole) and all(
            end <= size for end, size in zip(ends, part.whole, strict=True)
        )
        same = (part.whole, part.entry.dtype) == (first.whole, first.entry.dtype)
        if not is_inside or not same:
            raise ValueError(
                f"{part.file} holds of {name} {part.entry.dtype}{list(part.entry.shape)} at "
                f"{list(part.offset)} of {list(part.whole)}, which is no part of "
                f"{first.entry.dtype}{list(first.whole)}"
            )
    regions = {part.region for part in parts}
    intervals = [
        sorted({(region.offset[dim], region.shape[dim]) for region in regions})
        for dim in range(len(first.whole))
    ]
    is_grid = len(regions) == len(parts) == prod(len(cuts) for cuts in intervals)
    if not is_grid or not all(map(_covers, intervals, first.whole)):
        files = ", ".join(sorted({part.file.name for part in parts})[:4])
        raise ValueError(
            f"{first.file.parent} holds {len(parts)} parts of {name} (in {files}), which are not "
            f"all of its {list(first.whole)}, each once"
        )


def _covers(cuts: Sequence[tuple[int, int]], size: int) -> bool:
    """True if intervals (start, length), in their order, cover [0, size) without an overlap."""
    begins_and_ends = cuts[0][0] == 0 and sum(cuts[-1]) == size
    return begins_and_ends and all(sum(one) == other[0] for one, other in pairwise(cuts))
