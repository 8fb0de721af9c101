"""GGUF files, version 3, which llama.cpp reads: one file with the weights, the numbers of the model
and its tokenizer.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from io import BufferedWriter
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from minitune import tree
from minitune.errors import InputError
from minitune.interop.gguf import blocks
from minitune.interop.gguf import vocabulary as gguf_vocabulary
from minitune.interop.gguf.architectures import Architecture, architecture, tensor_name
from minitune.interop.gguf.metadata import StoredTensor, pad, write_header
from minitune.interop.gguf.mixtures import RECIPES, GGUFType, Mixture, mixture_kind
from minitune.interop.gguf.numbers import divisors, numbers
from minitune.io.results import result_file
from minitune.models.config import DecoderConfig
from minitune.models.model import Model
from minitune.quant.schemes import dequantize
from minitune.quant.tensors import QNF4, QNVFP4, QInt4, QInt8, QTensor
from minitune.text.tokenizer import Tokenizer
from minitune.types import Counting, Params, uncounted

# weights that are encoded at a time, so that a file needs little more memory than its model
CHUNK = 2**22
NO_IMPORTANCE: Mapping[str, Tensor] = MappingProxyType({})


class Types(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Types of the stored matrices: a default, and by glob of Hugging Face names another; the first
    glob that matches counts.
    """

    # type of each matrix that no exception matches; Q4_K_M and its kin are llama.cpp's mixtures
    default: GGUFType | Mixture
    # glob of Hugging Face names -> another type; the first match wins
    exceptions: dict[str, GGUFType] = {}

    @property
    def file_type(self) -> int:
        """Number of the file's type, which is that of most of its matrices."""
        recipe = RECIPES.get(self.default)
        return blocks.TYPES[self.default].file_type if recipe is None else recipe.file_type

    def kind(self, name: str, config: DecoderConfig, arch: Architecture) -> str:
        """Type that is asked for a matrix, given its Hugging Face name."""
        for glob, kind in self.exceptions.items():
            if fnmatchcase(name, glob):
                return kind
        if self.default in RECIPES:
            return mixture_kind(self.default, name, config, arch)
        return self.default


class _Part(NamedTuple):
    """Tensor of the file: w plus shift, its rows in the order in which they are written, None as
    they are.
    """

    name: str
    w: Tensor | QTensor
    kind: str
    order: Int[Tensor, "out"] | None = None
    shift: float = 0.0
    importance: Float[Tensor, "in"] | None = None  # of the columns

    def entry(self) -> StoredTensor:
        """Line of the file's table."""
        block = blocks.TYPES[self.kind]
        return StoredTensor(
            self.name, self.w.shape, block.id, self.w.shape.numel() // block.size * block.n_bytes
        )


def check(params: Params, model: Model, types: Types, tokenizer: Tokenizer) -> None:
    """InputError for what `save` would refuse, given the weights' shapes alone."""
    arch, _ = architecture(model)
    _parts(params, model.config, arch, types)
    gguf_vocabulary.tokens_beyond(tokenizer, model.config.vocab_size)


def save(
    path: Path,
    params: Params,
    model: Model,
    types: Types,
    *,
    tokenizer: Path,
    template: str | None,
    stop_ids: Sequence[int],
    importance: Mapping[str, Tensor] = NO_IMPORTANCE,
    counting: Counting = uncounted,
) -> list[str]:
    """Write the file and return notes: tensors whose rows do not fit the blocks of the type that
    was asked for, and what llama.cpp will not do as minitune does.

    importance: of the columns of a matrix, by which its K type weighs errors; where there is none,
    they weigh as llama.cpp has it. counting: of the tensors that are written.

    Norms and biases stay float32. Quantized leaves are dequantized, but int8 to Q8_0, and int4 in
    groups of a multiple of 32 to Q4_0, keep their codes. InputError for a model that llama.cpp has
    no counterpart for, a glob that matches nothing, and a weight beyond the range of float16 that
    is to be stored in it.
    """
    arch, limits = architecture(model)
    parts, notes = _parts(params, model.config, arch, types, importance)
    vocabulary, more = gguf_vocabulary.metadata(tokenizer, model.config.vocab_size, stop_ids)
    keys = {
        **numbers(arch, model.config),
        "general.file_type": types.file_type,
        **vocabulary,
    }
    if template is not None:
        keys["tokenizer.chat_template"] = template
    path.parent.mkdir(parents=True, exist_ok=True)
    with result_file(path) as aside, aside.open("wb") as file:
        write_header(file, arch.name, keys, [part.entry() for part in parts])
        _write(file, parts, counting)
    return [*notes, *more, *limits]


def _write(file: BufferedWriter, parts: Sequence[_Part], counting: Counting) -> None:
    """Write the rows of each tensor, and the padding behind them."""
    with counting(len(parts)) as on_tensor:
        for part in parts:
            for rows in _encoded(part):
                file.write(rows.cpu().numpy().tobytes())
            pad(file)
            on_tensor()


def _parts(
    params: Params,
    config: DecoderConfig,
    arch: Architecture,
    types: Types,
    importance: Mapping[str, Tensor] = NO_IMPORTANCE,
) -> tuple[list[_Part], list[str]]:
    """Tensors of the file in their order, and notes on those that get another type than the one
    that was asked for.
    """
    notes = []
    parts = [_Part(name, w, "F32") for name, w in divisors(config).items()]
    if types.exceptions:
        tree.select(params, list(types.exceptions), "gguf: exceptions")
    for name, w in params.items():
        asked = "F32" if len(w.shape) == 1 else types.kind(name, config, arch)
        kind = _fitting(asked, w.shape[-1])
        if kind != asked:
            size = blocks.TYPES[asked].size
            notes.append(
                f"{name} is {kind}, not {asked}: its rows of {w.shape[1]} are no multiple of {size}"
            )

        # llama.cpp rotates neighbours in some families, and multiplies by the weight of a norm as
        # it is stored in all.
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        order = None if heads is None or not arch.neighbours else _interleaved(w.shape[0], heads)
        shift = 1.0 if config.norm == "one_plus_w" and name.endswith("norm.weight") else 0.0
        stored = tensor_name(config, name)
        parts.append(_Part(stored, w, kind, order, shift, importance.get(name)))
    return parts, notes


def _fitting(kind: str, d_in: int) -> str:
    """Type whose blocks divide a row of d_in, the type itself if its own do."""
    while d_in % blocks.TYPES[kind].size:
        kind = blocks.TYPES[kind].otherwise
    return kind


def _interleaved(n_rows: int, heads: int) -> Int[Tensor, "out"]:
    """Rows for a RoPE that rotates neighbours, where the weights of Hugging Face rotate dimension i
    with i + d_head / 2.
    """
    return torch.arange(n_rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _encoded(part: _Part) -> Iterator[UInt8[Tensor, "rows row_bytes"]]:
    w = dequantize(part.w, torch.float32) if isinstance(part.w, QNF4 | QNVFP4) else part.w
    w = w[:, None] if isinstance(w, Tensor) and w.ndim == 1 else w
    order = torch.arange(w.shape[0]) if part.order is None else part.order
    for some in order.split(max(1, CHUNK // w.shape[1])):
        chunk = tree.map(lambda x, some=some: x[some], w)
        if isinstance(chunk, QInt8) and part.kind == "Q8_0":
            yield blocks.q8_0_of(chunk)
        elif (
            isinstance(chunk, QInt4)
            and part.kind == "Q4_0"
            and chunk.shape[1] // chunk.scale.shape[1] % 32 == 0
        ):
            yield blocks.q4_0_of(chunk)
        else:
            dense = chunk if isinstance(chunk, Tensor) else dequantize(chunk, torch.float32)
            rows = _in_range(dense.float() + part.shift, part)
            yield blocks.encode(rows, part.kind, part.importance)


def _in_range(x: Float[Tensor, "rows in"], part: _Part) -> Float[Tensor, "rows in"]:
    """Rows that the type can hold; InputError for infinity, NaN and what is infinity in float16."""
    limit = torch.finfo(torch.float16 if part.kind == "F16" else torch.float32).max
    largest = x.abs().amax()
    if not bool(largest <= limit):
        raise InputError(
            f"gguf: {part.name} holds {float(largest):.4g}, expected numbers up to {limit:.6g} as "
            f"{part.kind}; give it the type BF16 if it is finite, else take the model from before "
            "its training diverged"
        )
    return x
