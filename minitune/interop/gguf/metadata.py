"""Metadata and tensor table of a GGUF file: each key with the type that the format gives it."""

import struct
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from typing import Any, NamedTuple

ALIGNMENT = 32  # bytes
STRING, ARRAY = 8, 9  # the format's numbers of types
SCALARS = {
    "uint32": (4, "<I"),
    "int32": (5, "<i"),
    "float32": (6, "<f"),
    "bool": (7, "<?"),
}  # type -> number, packing
# The type of every key that is written, without the architecture's name: llama.cpp refuses others.
TYPES = {
    "string": """general.architecture general.name rope.scaling.type
        tokenizer.ggml.model tokenizer.ggml.pre tokenizer.chat_template""",
    "uint32": """general.file_type general.quantization_version context_length
        embedding_length block_count feed_forward_length vocab_size attention.head_count
        attention.head_count_kv attention.key_length attention.value_length
        attention.sliding_window rope.dimension_count rope.scaling.original_context_length
        tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.unknown_token_id
        tokenizer.ggml.padding_token_id tokenizer.ggml.eot_token_id""",
    "float32": """attention.layer_norm_rms_epsilon attention.scale attention.temperature_scale
        attn_logit_softcapping final_logit_softcapping logit_scale residual_scale embedding_scale
        rope.freq_base rope.freq_base_swa rope.scaling.factor rope.scaling.attn_factor
        rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow""",
    "bool": """tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token
        tokenizer.ggml.add_space_prefix""",
    "strings": "tokenizer.ggml.tokens tokenizer.ggml.merges",
    "int32s": "tokenizer.ggml.token_type",
    "float32s": "tokenizer.ggml.scores",
    "bools": "attention.sliding_window_pattern",
}


class StoredTensor(NamedTuple):
    """Entry of the tensor table: shape as in torch, block_type the number of the block format."""

    name: str
    shape: Sequence[int]
    block_type: int
    n_bytes: int


def write_header(
    file: BufferedWriter,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Sequence[StoredTensor],
) -> None:
    """Write what stands before the data of the tensors, which follow in order, padded as by `pad`.

    keys: values by the names of TYPES; those of the model get the architecture's name in front.
    """
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, value in keys.items():
        whole = key if key.startswith(("general.", "tokenizer.")) else f"{architecture}.{key}"
        file.write(_string(whole) + _value(type_of(key), value))
    offset = 0
    for tensor in tensors:
        dims = tuple(tensor.shape)[::-1]  # the file lists the contiguous one first
        numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.block_type, offset)
        file.write(_string(tensor.name) + numbers)
        offset += tensor.n_bytes + -tensor.n_bytes % ALIGNMENT
    pad(file)


def pad(file: BufferedWriter) -> None:
    """Fill up with zeros to the next multiple of ALIGNMENT."""
    file.write(bytes(-file.tell() % ALIGNMENT))


def type_of(key: str) -> str:
    """Type of a key of TYPES; KeyError for another."""
    for kind, keys in TYPES.items():
        if key in keys.split():
            return kind
    raise KeyError(key)


def _value(kind: str, value: Any) -> bytes:
    """Number of the type, then the value; of a list, the type of its elements and their number."""
    if kind.endswith("s"):
        number, _ = (STRING, "") if kind == "strings" else SCALARS[kind.removesuffix("s")]
        elements = b"".join(_element(kind.removesuffix("s"), element) for element in value)
        return struct.pack("<IIQ", ARRAY, number, len(value)) + elements
    number = STRING if kind == "string" else SCALARS[kind][0]
    return struct.pack("<I", number) + _element(kind, value)


def _element(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "string" else struct.pack(SCALARS[kind][1], value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
