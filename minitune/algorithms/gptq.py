"""Quantization that looks at data: how the codes of a weight are chosen so that its outputs, not
its entries, change least.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitune.errors import InputError
from minitune.models import decoder
from minitune.models.block import Tap
from minitune.models.config import LayerKind, layer_kind
from minitune.models.model import Model
from minitune.models.weights import head_name, layer_of
from minitune.quant.rules import Quantization, refuse_not_finite
from minitune.quant.schemes import Int4, Int8, base_weight, with_base_weight
from minitune.quant.tensors import QInt4, QInt8
from minitune.sharding.gather import gather
from minitune.structs import CheckedStruct
from minitune.types import Batch, Params, PositiveFloat, PositiveInt

# columns whose errors are spread together, a multiple of every group: it changes the time, not the
# result
BLOCK = 128


class Rtn(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="rtn"):
    """Round every weight to the nearest code; no data is needed."""


class Gptq(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="gptq"):
    """Round column by column, each error undone as far as the later columns can (Frantar et al.
    2022, arXiv 2210.17323).
    """

    data: str  # name of a [data] table
    rows: PositiveInt  # of that table, to calibrate on: more are more exact, and take longer
    # share of the mean of the Hessian's diagonal that is added to it: more is steadier, less exact
    damp: PositiveFloat = 0.01


Method = Rtn | Gptq


# (name, codes of a weight) -> what is kept of them
Placing = Callable[[str, Any], Any]


def as_it_is(name: str, codes: Any) -> Any:
    """Codes of a weight, all of which are kept."""
    return codes


class BlockInputs(NamedTuple):
    """One batch on its way through the blocks: what the next block is given."""

    x: Float[Tensor, "B T D"]
    mixer: Mapping[LayerKind, Any]  # what the mixers of each kind of layer share
    is_token: Bool[Tensor, "B T"]  # False at padding


def gptq(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    quantization: Quantization,
    *,
    damp: float,
    on_block: Callable[[int], None] = lambda n_done: None,
    placed: Placing = as_it_is,
) -> Params:
    """Parameters, the planned ones quantized by GPTQ on the tokens of the batches, padding left out
    but for what a mixture's experts see of it. Block by block: what a block sees has come through
    the quantized blocks before it. Of an adapted leaf the weight is quantized, and its change stays
    as it is.

    on_block: called after each block with how many are done. placed: gives what is kept of a
    weight's codes. Ranks that share weights all call gptq with the same batches. InputError for
    another scheme than int8 and int4, no batches, and a weight not finite or of no linear map.
    """
    grids = _checked_grids(params, batches, quantization)
    head = head_name(model.config)

    def calibrated(name: str, leaf: Any, gram: Tensor) -> Any:
        codes = gptq_weight(base_weight(leaf), gram, grids[name], damp)
        return with_base_weight(leaf, placed(name, codes))

    with torch.no_grad():
        inputs = [before_first_block(model, params, batch) for batch in batches]
        for i in range(model.config.n_layers):
            block = gather(_block_leaves(params, i))
            grams = _summed(_grams(model, block, i, one, grids) for one in inputs)
            codes = {name: calibrated(name, block[name], gram) for name, gram in grams.items()}
            params = {**params, **codes}
            inputs = [after_block(model, {**block, **gather(codes)}, i, one) for one in inputs]
            on_block(i + 1)
        if head in grids:
            leaf, gram = gather(params[head]), _head_gram(model, params, batches)
            params = {**params, head: calibrated(head, leaf, gram)}
    _refuse_unused(params, grids)
    return params


def _block_leaves(params: Params, i: int) -> Params:
    """Leaves of block i under their whole names."""
    prefix = f"model.layers.{i}."
    return {name: w for name, w in params.items() if name.startswith(prefix)}


def _checked_grids(
    params: Params, batches: Sequence[Batch], quantization: Quantization
) -> dict[str, Int8 | Int4]:
    """Grid of each weight that is to be quantized; InputError as gptq says."""
    grids = _integer_grids(params, quantization)
    if not batches:
        raise InputError(
            "gptq: no row of data to calibrate on, expected at least one; look at the data table "
            "of gptq"
        )
    for name in grids:
        refuse_not_finite({name: gather(base_weight(params[name]))}, [name])
    return grids


def _head_gram(model: Model, params: Params, batches: Sequence[Batch]) -> Tensor:
    """Gram matrix of the hidden states that the head is given."""
    states = (model.hidden(params, batch)[batch.segment_ids > 0] for batch in batches)
    return _summed({"head": _gram(x)} for x in states)["head"]


def _integer_grids(params: Params, quantization: Quantization) -> dict[str, Int8 | Int4]:
    """Scheme of each weight that is to be quantized; InputError for one without a grid."""
    plan = quantization.plan(params)
    grids: dict[str, Int8 | Int4] = {}
    for name, scheme in plan.items():
        if isinstance(scheme, Int8 | Int4):
            grids[name] = scheme
    if len(grids) < len(plan):
        odd = next(name for name in plan if name not in grids)
        kind = plan[odd].__struct_config__.tag
        raise InputError(
            f"gptq: {odd} is to be {kind}, expected int8 or int4 for gptq; choose the method rtn "
            f"for {kind}"
        )
    return grids


def _refuse_unused(params: Params, grids: Mapping[str, Int8 | Int4]) -> None:
    """InputError for a weight that is still dense after all blocks."""
    unused = next((name for name in grids if isinstance(base_weight(params[name]), Tensor)), None)
    if unused is not None:
        raise InputError(
            f"gptq: {unused} is used by no linear map of a block, expected one; except it or "
            "choose the method rtn"
        )


def gptq_weight(
    w: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], scheme: Int8 | Int4, damp: float
) -> QInt8 | QInt4:
    """Leaf that makes |X (W - Q)^T| small, where gram = X^T X (Frantar et al. 2022, algorithm 1).

    The scale of a group is chosen when its first column is reached, from weights that already hold
    the earlier columns' errors.
    """
    d_in = w.shape[1]
    group = scheme.group_size(d_in)
    factor = _inverse_factor(gram, damp).to(torch.float32)
    later, scale = w.float(), w.new_empty(0)
    levels: list[Tensor] = []
    scales: list[Tensor] = []
    for start in range(0, d_in, BLOCK):
        stop = min(start + BLOCK, d_in)
        block, later = later[:, : stop - start], later[:, stop - start :]
        errors: list[Tensor] = []
        for j in range(start, stop):
            if j % group == 0:
                scale = scheme.scale(
                    torch.cat([block, later[:, : max(0, group - block.shape[1])]], dim=1)[:, :group]
                )
                scales.append(scale)
            level = scheme.levels(block[:, :1], scale)
            error = (block[:, :1] - level * scale) / factor[j, j]
            block = block[:, 1:] - error * factor[j, j + 1 : stop]
            levels.append(level)
            errors.append(error)
        later = later - torch.cat(errors, dim=1) @ factor[start:stop, stop:]
    return scheme.pack(torch.cat(levels, dim=1), torch.cat(scales, dim=1))


def _inverse_factor(gram: Float[Tensor, "in in"], damp: float) -> Float[Tensor, "in in"]:
    """Upper triangular U with U^T U = (gram + damp mean(diagonal) I)^-1, in float64; the identity
    where no input was seen.
    """
    wide = gram.double()
    mean = wide.diagonal().mean()
    damped = wide + torch.where(mean > 0, damp * mean, 1.0) * torch.eye(
        len(wide), dtype=wide.dtype, device=wide.device
    )
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def before_first_block(model: Model, params: Params, batch: Batch) -> BlockInputs:
    """Batch as the first block is given it."""
    x, mixer = decoder.before_first_block(model.config, params, batch.tokens, batch.segment_ids)
    return BlockInputs(x, mixer, batch.segment_ids > 0)


def after_block(
    model: Model, params: Params, i: int, inputs: BlockInputs, tap: Tap | None = None
) -> BlockInputs:
    """Batch behind block i; tap sees the block's linear maps."""
    kind = layer_kind(model.config, i)
    layer = gather(layer_of(params, i))
    x = model.block(model.config, kind.mixer, layer, inputs.x, inputs.mixer[kind], tap=tap)
    return inputs._replace(x=x)


def _grams(
    model: Model, params: Params, i: int, inputs: BlockInputs, names: Container[str]
) -> dict[str, Tensor]:
    """X^T X over the real tokens for those weights of block i that are among `names`."""
    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        whole_name = f"model.layers.{i}.{name}"
        if whole_name in names:
            grams.update(_summed([grams, {whole_name: _gram(token_rows(x, inputs))}]))

    after_block(model, params, i, inputs, add)
    return grams


def token_rows(x: Float[Tensor, "*rows in"], inputs: BlockInputs) -> Float[Tensor, "n in"]:
    """Rows of a linear map's input without those of padding."""
    # an expert's rows have left their places, and padding with them
    return x[inputs.is_token] if x.shape[:-1] == inputs.is_token.shape else x


def _gram(x: Float[Tensor, "n in"]) -> Float[Tensor, "in in"]:
    wide = x.float()
    return wide.T @ wide


def _summed(grams: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for one in grams:
        total = {
            **total,
            **{name: total[name] + gram if name in total else gram for name, gram in one.items()},
        }
    return total
