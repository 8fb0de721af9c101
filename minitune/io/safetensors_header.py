"""Frame of a safetensors file, without torch: eight bytes of length, a JSON header, then the bytes
of the tensors.

https://huggingface.co/docs/safetensors - a header is read here and checked against the file before
anything trusts an offset.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import msgspec

from minitune.io.json_file import read_json

BITS = {  # of one element, in the order in which the safetensors library lays tensors out
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
    **dict.fromkeys(["F32", "U32", "I32"], 32),
    **dict.fromkeys(["BF16", "F16", "U16", "I16"], 16),
    **dict.fromkeys(
        ["F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"], 8
    ),
    **dict.fromkeys(["F6_E3M2", "F6_E2M3"], 6),
    "F4": 4,
}
ORDER = tuple(BITS)
MAX_HEADER = 100_000_000  # bytes, the library's own limit
METADATA = "__metadata__"
NO_TABLE = "its header is no table of tensors"
NO_METADATA: Mapping[str, str] = MappingProxyType({})
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """Position of a tensor: its dtype in the file's words ("BF16"), its shape, and [start, end) in
    bytes of the whole file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)


UInt63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Raw(msgspec.Struct):
    dtype: str
    shape: Annotated[list[UInt63], msgspec.Meta(max_length=64)]
    data_offsets: tuple[UInt63, UInt63]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_weight_map(folder: Path, room: str, remedy: str) -> dict[str, str]:
    """File name of every weight, as the index of a folder's shards says it; InputError as read_json
    raises it.
    """
    return read_json(folder / INDEX, _Index, room, remedy).weight_map


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of a file by name, in the order of the header; ValueError says what is wrong with a
    file that is not whole.
    """
    table, begin, size = _table(path)
    try:
        entries = {
            name: _entry(name, msgspec.json.decode(value, type=_Raw), begin)
            for name, value in table.items()
            if name != METADATA
        }
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{NO_TABLE}: {error}") from None
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"{name} begins at byte {entry.start}, expected {end}")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """Texts by name that a file's header holds beside its tensors; ValueError as read_header."""
    table, _, _ = _table(path)
    try:
        return msgspec.json.decode(table.get(METADATA, b"{}"), type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{NO_TABLE}: {error}") from None


def _table(path: Path) -> tuple[dict[str, msgspec.Raw], int, int]:
    """(header, its entries still JSON; the byte where tensors begin; bytes of the file)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or n_bytes > min(size - 8, MAX_HEADER):
            raise ValueError(f"its header should have {n_bytes} bytes, the file has {size}")
        header = file.read(n_bytes)
    try:
        return msgspec.json.decode(header, type=dict[str, msgspec.Raw]), 8 + n_bytes, size
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{NO_TABLE}: {error}") from None


def _entry(name: str, raw: _Raw, begin: int) -> Entry:
    if raw.dtype not in BITS:
        raise ValueError(f"{name} has dtype {raw.dtype!r}")
    if BITS[raw.dtype] * prod(raw.shape) != 8 * (raw.data_offsets[1] - raw.data_offsets[0]):
        raise ValueError(f"{name} {raw.dtype}{raw.shape} has bytes {list(raw.data_offsets)}")
    return Entry(
        raw.dtype, tuple(raw.shape), begin + raw.data_offsets[0], begin + raw.data_offsets[1]
    )


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] = NO_METADATA,
) -> bytes:
    """Start of a file for tensors (dtype, shape), which must follow in this order: the library
    orders them by (ORDER.index(dtype), name) and so should the caller. metadata: texts by name.
    """
    header: dict[str, dict[str, Any]] = {METADATA: {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + BITS[dtype] * prod(shape) // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, so that they can be mapped
    return len(text).to_bytes(8, "little") + text
