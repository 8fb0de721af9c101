"""ExecuTorch programs, which run on phones: a folder with the program, config.json and the
tokenizer, for XNNPACK and for ExecuTorch's own TextLLMRunner.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.export import Dim

from minitune import tree
from minitune.checkpoint.hf_folder import FolderExtras, write_beside_weights
from minitune.errors import InputError
from minitune.interop.compressed_tensors import Activations
from minitune.interop.graphs import module_of, notes, quiet, require_packages
from minitune.interop.readers.executorch import BITS
from minitune.io.atomic import require_room
from minitune.io.results import result_folder
from minitune.models import decoder
from minitune.models.mixers.grouped_query import KVCache
from minitune.models.model import Model, untransformed
from minitune.nn.attention.key_range import KeyRange
from minitune.quant.levels import levels_of
from minitune.quant.tensors import QInt4, QInt8
from minitune.types import Params

FILE = "model.pte"
PACKAGES = {"executorch": "to write .pte files", "torchao": "to write .pte files"}
CONTEXT = 2048  # tokens that the caches have room for, unless a program says another number
# Tokens that one call reads at most. ExecuTorch plans the memory of the longest call in advance,
# and its runner reads a longer prompt in several.
N_NEW = 128
GROUP = 32  # XNNPACK multiplies groups of 4-bit codes whose size is a multiple of this
FLOAT_BITS = 32
CODE_BITS: Mapping[type, int] = MappingProxyType({QInt4: 4, QInt8: 8})
PARTS = ("codes", "scale", "zero_point")  # tensors of a quantized weight


def context_len(model: Model, asked: int | None) -> int:
    """Tokens of a prompt with its answer that the caches have room for; InputError for more than
    the model was made for.
    """
    limit = model.config.max_positions
    if asked is not None and not 2 <= asked <= limit:
        raise InputError(
            f"executorch: max_context_len is {asked}, expected 2 to {limit}, the positions of the "
            "model; correct it"
        )
    return min(CONTEXT, limit) if asked is None else asked


def check(
    params: Params, model: Model, *, activations: Activations, max_context_len: int | None
) -> None:
    """InputError for what `save` would refuse, given leaves on any device, meta too."""
    require_packages(PACKAGES, "executorch")
    context_len(model, max_context_len)
    if model.config.chunk is not None or model.config.nope_growth is not None:
        raise InputError(
            "executorch: the model has chunks of attention or queries that grow (Llama 4), which "
            "ExecuTorch's runtime fails on, expected another family; export another format"
        )
    quantized = {name: w for name, w in params.items() if not isinstance(w, Tensor)}
    for name, w in quantized.items():
        _check_codes(name, w)
    if quantized and activations == "none":
        raise InputError(
            f"executorch: {next(iter(quantized))} is quantized and activations are 'none', "
            "expected 'int8': XNNPACK's kernels for such weights round each token's activations to "
            "8 bits; write activations = 'int8', or drop the quantize stage"
        )
    if activations == "int8" and not quantized:
        raise InputError(
            "executorch: activations = 'int8' but no weight is quantized, expected int4 or int8 "
            "weights with them; put a quantize stage before, or remove activations"
        )


def _check_codes(name: str, w: Any) -> None:
    """InputError for a quantized weight that XNNPACK does not multiply."""
    if not isinstance(w, QInt4 | QInt8):
        kind = type(w).__name__.removeprefix("Q").lower()
        raise InputError(
            f"executorch: {name} is {kind}, expected int4 or int8; quantize to int4 or int8, or "
            "drop the quantize stage"
        )
    group = w.shape[1] // w.scale.shape[1]
    if isinstance(w, QInt4) and group % GROUP:
        raise InputError(
            f"executorch: {name} has groups of {group}, expected a multiple of {GROUP}; write "
            f"group = {GROUP} in the quantize stage, or quantize it to int8"
        )


def save(
    folder: Path,
    params: Params,
    model: Model,
    extras: FolderExtras,
    *,
    bos_id: int | None,
    activations: Activations,
    max_context_len: int | None,
) -> list[str]:
    """Write the folder and return notes on what the program holds and on where it differs from
    minitune.

    The file has the method forward(tokens [1 T], position of the first [1]), which returns the
    logits [1 V] that the last token gives of the next.

    The program holds the keys and values of the tokens before that position. Dense weights are
    float32. Each token's activations are rounded to 8 bits where they meet QInt4 leaves (8da4w) or
    QInt8 leaves (8da8w). InputError for what `check` refuses.
    """
    check(params, model, activations=activations, max_context_len=max_context_len)
    n_slots = context_len(model, max_context_len)
    leaves = _leaves(params)
    require_room(folder, 2 * tree.n_bytes(leaves), "the program")
    with result_folder(folder) as aside, quiet():
        methods = _metadata(model, n_slots, extras.stop_ids, bos_id)
        exported = _exported(leaves, params, model, n_slots)
        program = _lowered(exported, {**methods, BITS: _bits(params)})
        with (aside / FILE).open("wb") as file:
            program.write_to_file(file)
        write_beside_weights(aside, leaves, model, extras)
    return [*_described(params), *notes(model)]


def _described(params: Params) -> list[str]:
    """Lines on how quantized weights are stored and multiplied."""
    lines = []
    for kind, name in ((QInt4, "8da4w: 4 bits"), (QInt8, "8da8w: 8 bits")):
        n = sum(isinstance(w, kind) for w in params.values())
        if n:
            lines.append(f"{n} weights as {name}, with each token's activations in 8 bits")
    return lines


def _leaves(params: Params) -> dict[str, Tensor]:
    """Tensors that the program holds: dense weights in float32, codes and scales of the others."""
    leaves: dict[str, Tensor] = {}
    for name, w in params.items():
        if isinstance(w, Tensor):
            leaves[name] = w.detach().to("cpu", torch.float32)
            continue
        assert isinstance(w, QInt4 | QInt8), "other kinds were refused by check"
        codes, scale = levels_of(w, w.codes.cpu()), w.scale.to("cpu", torch.float32)
        parts = codes, scale, torch.zeros_like(scale, dtype=torch.int8)
        leaves |= {f"{name}.{part}": x for part, x in zip(PARTS, parts, strict=True)}
    return leaves


def _bits(params: Params) -> int:
    """Bits of a number of the most rounded weight."""
    return min(CODE_BITS.get(type(w), FLOAT_BITS) for w in params.values())


def _metadata(
    model: Model, n_slots: int, stop_ids: Sequence[int], bos_id: int | None
) -> dict[str, int | bool | list[int]]:
    """Values of the methods by which ExecuTorch's runner knows a program."""
    bos = {} if bos_id is None else {"get_bos_id": bos_id}
    return {
        **bos,
        "get_eos_ids": list(stop_ids),
        "get_max_seq_len": min(N_NEW, n_slots),
        "get_max_context_len": n_slots,
        "get_vocab_size": model.config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }


def _exported(
    leaves: Mapping[str, Tensor], params: Params, model: Model, n_slots: int
) -> torch.export.ExportedProgram:
    """Graph of the forward, which reads any number of new tokens up to N_NEW."""
    caches = decoder.empty_caches(model.config, 1, n_slots, leaves["model.embed_tokens.weight"])
    buffers = {f"caches.{path}": x for path, x in tree.items(caches)}
    quantized = {name: w for name, w in params.items() if not isinstance(w, Tensor)}

    def forward(held: Params, tokens: Tensor, start: Tensor) -> Tensor:
        made = {name: _fake_quantized(name, w, held) for name, w in quantized.items()}
        return _forward(model, {**held, **made}, tokens, start)

    most = min(N_NEW, n_slots)
    n_example = min(5, most)
    inputs = torch.zeros(1, n_example, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    shapes = ({1: Dim("n_tokens", min=1, max=most)}, None)
    module = module_of(leaves, forward, buffers)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=False)


def _forward(
    model: Model, params: Params, tokens: Int[Tensor, "1 T"], start: Int[Tensor, "1"]
) -> Float[Tensor, "1 V"]:
    """Logits after the last token, whose keys and values and those of the others are written to the
    caches among the params.
    """
    slots = (start + torch.arange(tokens.shape[1]))[None]
    layers = range(model.config.n_layers)
    caches = [KVCache(params[f"caches.{i}.k"], params[f"caches.{i}.v"]) for i in layers]
    block_of = untransformed(model).block_of()
    keys = KeyRange((), slots)
    hidden = decoder.decode(model.config, params, tokens, caches, slots, keys, block_of)
    return model.logits(params, hidden[:, -1])


def _fake_quantized(name: str, w: Any, held: Params) -> Tensor:
    """Weight whose products are written into the graph as torchao writes them: activations and
    codes are decoded, a pattern that XNNPACK's partitioner knows.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    codes, scale, zero_point = (held[f"{name}.{part}"] for part in PARTS)
    return IntxUnpackedToInt8Tensor(
        codes,
        scale,
        zero_point,
        target_dtype=getattr(torch, f"int{CODE_BITS[type(w)]}"),
        block_size=(1, w.shape[1] // scale.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )


def _lowered(
    exported: torch.export.ExportedProgram, metadata: Mapping[str, int | bool | list[int]]
) -> Any:
    """Program of ExecuTorch, in which XNNPACK computes what it can."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import GeluConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # XNNPACK has one gelu, that of the error function, and would take its tanh form for that
    kinds = [kind for kind in ALL_PARTITIONER_CONFIGS if kind is not GeluConfig]
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner(configs=kinds)],
        constant_methods=dict(metadata),
    )
    return edge.to_executorch()
