"""GGUF files, version 3, which llama.cpp reads: one file with the weights, the numbers of the model and its tokenizer."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from minitune import tree
from minitune.errors import InputError
from minitune.interop.gguf import blocks
from minitune.interop.gguf import vocabulary as gguf_vocabulary
from minitune.io.results import result_file
from minitune.models import rope_scaling
from minitune.models.families import llama
from minitune.models.model import Model
from minitune.quant.schemes import dequantize
from minitune.quant.tensors import QNF4, QInt4, QInt8, QTensor
from minitune.types import Params

Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"]
ALIGNMENT = 32  # bytes
CHUNK = 2**22  # weights that are encoded at a time, so that a file needs little more memory than its model
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Types(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Types of the stored matrices: a default, and by glob of Hugging Face names another; the first glob that matches counts."""

    default: Kind
    exceptions: dict[str, Kind] = {}


class _Part(NamedTuple):
    """Tensor of the file; order: the rows of w in the order in which they are written, None as they are."""

    name: str
    w: Tensor | QTensor
    kind: str
    order: Int[Tensor, "out"] | None

    def n_bytes(self) -> int:
        block = blocks.TYPES[self.kind]
        return self.w.shape.numel() // block.block * block.n_bytes


def save(
    path: Path,
    params: Params,
    model: Model,
    types: Types,
    *,
    tokenizer: Path,
    template: str | None,
    stop_ids: Sequence[int],
) -> list[str]:
    """Write the file and return notes: tensors whose rows do not fit the blocks of the type that was asked for, and what
    llama.cpp will not do as minitune does.

    Norms and biases stay float32. Quantized leaves are dequantized, but int8 to Q8_0, and int4 in groups of a multiple of 32
    to Q4_0, keep their codes. InputError for a family other than llama, a glob that matches nothing and a vocabulary that is
    larger than the embedding.
    """
    if model.family is not llama.FAMILY:
        raise InputError(f"gguf: a model of {model.family.name}, expected the llama family; save it as a Hugging Face folder")
    if isinstance(model.config.rope_scaling, (rope_scaling.Yarn, rope_scaling.LongRope)):
        kind = type(model.config.rope_scaling).__name__.lower()
        raise InputError(f"gguf: RoPE scaling {kind!r}, expected none, linear, dynamic or llama3; save a Hugging Face folder")
    parts, notes = _parts(params, model, types)
    vocabulary, more = gguf_vocabulary.metadata(tokenizer, model.config.vocab_size, stop_ids)
    keys = {**_numbers(model.config), "general.file_type": blocks.TYPES[types.default].file_type, **vocabulary}
    if template is not None:
        keys["tokenizer.chat_template"] = template
    path.parent.mkdir(parents=True, exist_ok=True)
    with result_file(path) as aside, aside.open("wb") as file:
        _write_header(file, keys, parts)
        for part in parts:
            for rows in _encoded(part):
                file.write(rows.cpu().numpy().tobytes())
            _pad(file)
    if isinstance(model.config.rope_scaling, rope_scaling.Dynamic):
        more = [*more, f"dynamic RoPE scaling left out: llama.cpp is right up to {model.config.max_positions} tokens"]
    return [*notes, *more]


def _parts(params: Params, model: Model, types: Types) -> tuple[list[_Part], list[str]]:
    config, notes = model.config, []
    parts = [_Part("rope_freqs.weight", _divisors(config), "F32", None)] * isinstance(config.rope_scaling, rope_scaling.Llama3)
    if types.exceptions:
        tree.select(params, list(types.exceptions), "gguf: exceptions")
    for name, w in params.items():
        asked = next((kind for glob, kind in types.exceptions.items() if fnmatchcase(name, glob)), types.default)
        asked = kind = "F32" if len(w.shape) == 1 else asked
        while w.shape[-1] % blocks.TYPES[kind].block:
            kind = blocks.TYPES[kind].otherwise
        if kind != asked:
            block = blocks.TYPES[asked].block
            notes.append(f"{name} is {kind}, not {asked}: its rows of {w.shape[1]} are no multiple of {block}")
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        parts.append(_Part(_name(name), w, kind, None if heads is None else _interleaved(w.shape[0], heads)))
    return parts, notes


def _name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in TENSORS:
        return f"{TENSORS[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{TENSORS[inner]}.{kind}"


def _interleaved(n_rows: int, heads: int) -> Int[Tensor, "out"]:
    """Rows for a RoPE that rotates neighbours, where the weights of Hugging Face rotate dimension i with i + d_head / 2."""
    return torch.arange(n_rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _divisors(config: llama.Config) -> Float[Tensor, "half"]:
    """Divisors that llama.cpp applies to the unscaled frequencies."""
    plain, scaled = (
        rope_scaling.frequencies(config.d_head, config.rope_theta, scaling, 1, config.max_positions)
        for scaling in (None, config.rope_scaling)
    )
    return plain / scaled


def _numbers(config: llama.Config) -> dict[str, Any]:
    numbers = {
        "general.architecture": "llama",
        "general.quantization_version": 2,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.d_model,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.d_ff,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.attention.key_length": config.d_head,
        "llama.attention.value_length": config.d_head,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.d_head,
    }
    if isinstance(config.rope_scaling, rope_scaling.LinearScaling):
        return {**numbers, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": config.rope_scaling.factor}
    return numbers


def _encoded(part: _Part) -> Iterator[UInt8[Tensor, "rows row_bytes"]]:
    w = dequantize(part.w, torch.float32) if isinstance(part.w, QNF4) else part.w
    w = w[:, None] if isinstance(w, Tensor) and w.ndim == 1 else w
    order = torch.arange(w.shape[0]) if part.order is None else part.order
    for rows in order.split(max(1, CHUNK // w.shape[1])):
        chunk = tree.map(lambda x, rows=rows: x[rows], w)
        if isinstance(chunk, QInt8) and part.kind == "Q8_0":
            yield blocks.q8_0_of(chunk)
        elif isinstance(chunk, QInt4) and part.kind == "Q4_0" and chunk.shape[1] // chunk.scale.shape[1] % 32 == 0:
            yield blocks.q4_0_of(chunk)
        else:
            dense = chunk if isinstance(chunk, Tensor) else dequantize(chunk, torch.float32)
            yield blocks.encode(dense, part.kind)


def _write_header(file: BufferedWriter, keys: Mapping[str, Any], parts: Sequence[_Part]) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(parts), len(keys)))
    for key, value in keys.items():
        kind, data = _value(value)
        file.write(_string(key) + struct.pack("<I", kind) + data)
    offset = 0
    for part in parts:
        dims = part.w.shape[::-1]  # the file lists the contiguous one first
        numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, blocks.TYPES[part.kind].id, offset)
        file.write(_string(part.name) + numbers)
        offset += part.n_bytes() + -part.n_bytes() % ALIGNMENT
    _pad(file)


def _value(value: Any) -> tuple[int, bytes]:
    """(type number, bytes) of a metadata value; the elements of a list share the type of the first."""
    if isinstance(value, list):
        encoded = [_value(element) for element in value]
        kind = encoded[0][0] if encoded else 8
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(data for _, data in encoded)
    if isinstance(value, str):
        return 8, _string(value)
    kind, form = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}[type(value)]
    return kind, struct.pack(form, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(file: BufferedWriter) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
