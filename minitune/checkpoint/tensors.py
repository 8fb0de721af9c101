"""Safetensors files of named tensors, checked as they are read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitune import tree
from minitune.errors import InputError, quoted
from minitune.io import git_lfs
from minitune.io.safetensors_header import NO_METADATA, ORDER, header_bytes, read_header
from minitune.sharding.gather import gather
from minitune.sharding.offloaded import FileSlice, OpenFile
from minitune.sharding.parts import local_parts
from minitune.types import Params, Trainable

# fmt: off
WORDS = {  # safetensors' own for each dtype
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
# fmt: on


MadeTensors = Mapping[str, Callable[[], Tensor]]
NONE_MADE: MadeTensors = MappingProxyType({})


def dtype_of(word: str) -> torch.dtype | None:
    """Dtype that a file calls by one of safetensors' words, None where torch has none of it."""
    return next((dtype for dtype, known in WORDS.items() if known == word), None)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    on_tensor: Callable[[], object] | None = None,
    metadata: Mapping[str, str] = NO_METADATA,
    made: MadeTensors = NONE_MADE,
) -> None:
    """Write tensors under their names; storage that two names share is written for each.

    on_tensor is called when one is written. metadata: texts of the file's header. made: what makes
    a tensor when it is written, for those whose entry in `tensors` says the shape and dtype alone.
    """
    with path.open("wb") as file:
        pieces = serialized(tensors, metadata, made)
        file.write(next(pieces))
        for piece in pieces:
            file.write(piece)
            if on_tensor is not None:
                on_tensor()


def require_finite(leaves: Mapping[str, Any], where: str) -> None:
    """InputError that names a leaf with NaN or infinity; where: who asks."""
    for name, leaf in leaves.items():
        for x in tree.leaves(local_parts(leaf)):
            if not x.is_floating_point() or x.numel() == 0 or x.element_size() == 1:
                continue
            # both are NaN if one element is, and no other tensor of the size of x is made
            low, high = torch.aminmax(x.detach())
            if not bool(low.isfinite() & high.isfinite()):
                value = "NaN" if bool(low.isnan()) else "infinity"
                cure = "lower lr if training diverged, else write bfloat16 or float32"
                raise InputError(f"{where}: {name} holds {value}, expected finite numbers; {cure}")


def model_bytes(params: Params, trainable: Trainable, stored: Params) -> int:
    """Bytes of a model as it would be saved now: dense weights as stored, quantized ones as codes,
    and its deltas.
    """
    codes = {name: w for name, w in params.items() if not isinstance(w, Tensor)}
    deltas = {name: leaf for name, leaf in trainable.items() if not isinstance(leaf, Tensor)}
    return tree.n_bytes(({**stored, **codes}, deltas))


def serialized(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = NO_METADATA,
    made: MadeTensors = NONE_MADE,
) -> Iterator[bytes | memoryview]:
    """Bytes of a safetensors file, the header and then each tensor: at most two tensors are copied
    at a time, the piece in hand and the next.
    """
    order = sorted(tensors, key=lambda name: (ORDER.index(WORDS[tensors[name].dtype]), name))
    yield header_bytes(
        {name: (WORDS[tensors[name].dtype], tuple(tensors[name].shape)) for name in order}, metadata
    )
    for name in order:
        # whole, where each rank holds a part: all ranks then take the tensors in this order
        x = made[name]() if name in made else tensors[name]
        x = gather(x.detach()).cpu().contiguous()
        # a single element may keep a stride that view would refuse
        flat = x.as_strided((x.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped; InputError if it is missing, cut short or
    no such file.
    """
    with opened_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def file_slices(path: Path) -> dict[str, FileSlice]:
    """Tensors of one safetensors file by name, as they lie there; none is read. InputError as for
    load_tensors.
    """
    try:
        header, file = read_header(path), OpenFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    dtypes = {name: dtype_of(entry.dtype) for name, entry in header.items()}
    return {
        name: FileSlice(file, header[name].start, header[name].shape, dtype)
        for name, dtype in dtypes.items()
        if dtype is not None
    }


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; InputError for one that is damaged or absent."""
    try:
        read_header(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    if git_lfs.is_pointer(path):
        return InputError(f"checkpoint: {path} {git_lfs.REMEDY}")
    reason = quoted(error)
    return InputError(
        f"checkpoint: {path} is no whole safetensors file ({reason}); download or save it again"
    )
