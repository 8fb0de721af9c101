"""ONNX files, which onnxruntime runs: a folder with the graph, config.json and the tokenizer,
inputs and outputs named as Optimum and transformers.js expect them.
"""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.export import Dim

from minitune import tree
from minitune.checkpoint.hf_folder import FolderExtras, write_beside_weights
from minitune.errors import InputError
from minitune.interop.graphs import module_of, notes, quiet, require_packages
from minitune.io.atomic import require_room
from minitune.io.results import result_folder
from minitune.models import decoder
from minitune.models.config import DecoderConfig
from minitune.models.mixers.grouped_query import KVCache
from minitune.models.model import Model, untransformed
from minitune.nn.attention.key_range import KeyRange
from minitune.types import Params

GraphDtype = Literal["float32", "float16"]
FILE = "model.onnx"
PACKAGES = {"onnx": "to write ONNX files", "onnxscript": "to write ONNX files"}
SINGLE_FILE_BYTES = 15 * 10**8  # protobuf holds 2 GiB: larger weights lie in a file of their own
# sizes of the example that is traced, none of which is a size of a model by chance: each becomes a
# dimension that is free
BATCH, N_NEW, N_PAST = 3, 5, 7


def check(params: Params, model: Model) -> None:
    """InputError for a missing package, and for weights that a graph can't hold."""
    require_packages(PACKAGES, "onnx")
    quantized = next((name for name, w in params.items() if not isinstance(w, Tensor)), None)
    if quantized is not None:
        raise InputError(
            f"onnx: {quantized} is quantized, expected dense weights; drop the quantize stage, or "
            "quantize the file with the tools of onnxruntime"
        )


def save(
    folder: Path,
    params: Params,
    model: Model,
    extras: FolderExtras,
    *,
    dtype: GraphDtype,
    cache: bool,
) -> list[str]:
    """Write the folder and return notes on where the file differs from minitune.

    Inputs: input_ids [batch sequence] and attention_mask [batch past + sequence], 0 for padding on
    the left; with a cache also past_key_values.i.key and .value [batch heads past d_head]. Outputs:
    logits, and with a cache present.i.key and .value, which are the past of the next call.
    InputError for a missing package, quantized weights, and numbers that float16 can't hold.
    """
    check(params, model)
    kept = _cast(params, getattr(torch, dtype))
    n_bytes = tree.n_bytes(kept)
    require_room(folder, 2 * n_bytes, "the graph and its weights")
    names = _cache_names(model.config) if cache else []
    with result_folder(folder) as aside, quiet():
        with extras.counting(model.config.n_layers) as on_layer:
            graph = _exported(kept, model, cache, on_layer)
        torch.onnx.export(
            graph,
            (),
            aside / FILE,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            custom_translation_table={torch.ops.aten.index_copy.default: _appended},
            external_data=n_bytes > SINGLE_FILE_BYTES,
            dynamo=True,
            verbose=False,
        )
        write_beside_weights(aside, kept, model, extras)
    return notes(model)


def _cast(params: Params, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights on the CPU in a dtype; InputError for a number that it can't hold."""
    cast = {name: w.detach().to("cpu", dtype) for name, w in params.items()}
    for name, w in cast.items():
        if not bool(torch.isfinite(w).all()):
            limit = torch.finfo(dtype).max
            raise InputError(
                f"onnx: {name} holds {float(params[name].abs().max()):.4g}, expected numbers up to "
                f"{limit:.6g} as {str(dtype).removeprefix('torch.')}; write float32"
            )
    return cast


def _cache_names(config: DecoderConfig) -> list[str]:
    """Names of the caches' tensors, in the order of the graph."""
    return [f"{i}.{part}" for i, part in product(range(config.n_layers), ("key", "value"))]


def _exported(
    params: dict[str, Tensor], model: Model, cache: bool, on_layer: Callable[[], object]
) -> torch.export.ExportedProgram:
    """Graph of the forward, in which batch and lengths are free; on_layer is called when one of its
    layers is traced."""
    config, like = model.config, params["model.embed_tokens.weight"]
    past: list[Tensor] = []
    if cache:
        caches = decoder.empty_caches(config, BATCH, N_PAST, like)
        past = tree.leaves(caches)
    n_past = N_PAST if cache else 0
    ids = torch.zeros(BATCH, N_NEW, dtype=torch.int64)
    mask = torch.ones(BATCH, n_past + N_NEW, dtype=torch.int64)

    block_of = untransformed(model).block_of()

    def counted(i: int) -> Callable[..., Tensor]:
        on_layer()
        return block_of(i)

    def forward(leaves: Params, *inputs: Any) -> list[Tensor]:
        return _forward(model, counted, leaves, *inputs)

    batch, new, old = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    total = Dim("total_sequence_length") if cache else new
    shapes = ({0: batch, 1: new}, {0: batch, 1: total}, [{0: batch, 2: old} for _ in past])
    module, inputs = module_of(params, forward), (ids, mask, past)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=False)


def _forward(
    model: Model,
    block_of: decoder.BlockOf,
    params: Params,
    ids: Int[Tensor, "B T"],
    mask: Int[Tensor, "B S"],
    past: Sequence[Float[Tensor, "B K P E"]],
) -> list[Tensor]:
    """Logits of new tokens, and the keys and values of all tokens if there were some of earlier."""
    n_rows, n_new = ids.shape
    n_past = past[0].shape[2] if past else 0
    slots = torch.arange(n_past, n_past + n_new)[None]

    # padding on the left sees padding alone, as in generation
    n_seen = mask.cumsum(1)
    first = (n_seen == 0).sum(1, keepdim=True)
    keys = KeyRange(torch.where(slots < first, 0, first), slots)
    positions = (n_seen - 1).clamp(min=0).index_select(1, slots[0])

    empty = decoder.empty_caches(model.config, n_rows, n_new, params["model.embed_tokens.weight"])
    caches = empty
    if past:
        older = [KVCache(*pair) for pair in zip(past[::2], past[1::2], strict=True)]
        caches = tree.map(lambda old, new: torch.cat([old, new], dim=2), older, empty)
    hidden = decoder.decode(model.config, params, ids, caches, positions, keys, block_of)
    return [model.logits(params, hidden), *(tree.leaves(caches) if past else [])]


def _appended(x: Any, dim: int, index: Any, source: Any) -> Any:
    """ONNX operators for index_copy: x with its last places replaced by source. Every write to a
    cache goes to its end here, and a concatenation is the cheapest form of that.
    """
    from onnxscript import opset20

    op: Any = opset20

    def size(one: Any) -> Any:
        return op.Shape(one, start=dim, end=dim + 1)

    n_kept = op.Sub(size(x), size(source))
    zero, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[dim])
    return op.Concat(op.Slice(x, zero, n_kept, axis), source, axis=dim)
