"""Quantization that looks at data: how the codes of a weight are chosen so that its outputs, not its entries, change least."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from msgspec import Meta
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minitune.models import Model
from minitune.quant import NF4, Int4, Int8, Quantization, refuse_not_finite
from minitune.types import NO_DELTAS, Batch, Deltas, InputError, Params, QInt4, QInt8

BLOCK = 128  # columns whose errors are spread together, a multiple of every group: it changes the time, not the result


class Rtn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="rtn"):
    """Round every weight to the nearest code; no data is needed."""


class Gptq(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="gptq"):
    """Round column by column, each error undone as far as the later columns can (Frantar et al. 2022, arXiv 2210.17323)."""

    data: str  # name of a [data] table
    rows: Annotated[int, Meta(gt=0)]  # of that data
    damp: Annotated[float, Meta(gt=0)] = 0.01  # added to the Hessian's diagonal, as a part of the diagonal's mean


Method = Rtn | Gptq


class _Walk(NamedTuple):
    """One batch on its way through the blocks, each called with (weights, deltas, x, *rest)."""

    block: Callable[..., Tensor]
    calls: list[tuple[Params, Deltas, tuple[Any, ...]]]  # for each block: weights, deltas, rest
    x: Float[Tensor, "B T D"]
    real: Bool[Tensor, "B T"]


def gptq(
    model: Model, params: Params, batches: Sequence[Batch], quantization: Quantization, *, damp: float, deltas: Deltas = NO_DELTAS
) -> Params:
    """All parameters, the planned ones quantized by GPTQ on the tokens of the batches, padding left out but for what a mixture's
    experts see of it; deltas are as a forward takes them. Block by block: what a block sees has come through the quantized blocks
    before it.

    InputError for an nf4 or float8 scheme, for no batches, and for a weight that is not finite or that no linear map of the model
    uses.
    """
    plan = quantization.plan(params)
    grids: dict[str, Int8 | Int4] = {name: scheme for name, scheme in plan.items() if isinstance(scheme, Int8 | Int4)}
    if len(grids) < len(plan):
        odd = next(name for name in plan if name not in grids)
        kind = "nf4" if isinstance(plan[odd], NF4) else "float8"
        raise InputError(f"calibrate: {odd} is to be {kind}, expected int8 or int4 for gptq; choose the method rtn for {kind}")
    if not batches:
        raise InputError("calibrate: no row of data to calibrate on, expected at least one; look at the data table of gptq")
    refuse_not_finite(params, plan)
    quantized: dict[str, QInt8 | QInt4] = {}
    head = model.family.head_name(model.config)
    names = {id(params[name]): name for name in grids}
    with torch.no_grad():
        walks = [_start(model, params, deltas, batch) for batch in batches]
        for i in range(len(walks[0].calls)):
            grams = _summed(_grams(walk, i, names) for walk in walks)
            new = {name: gptq_weight(params[name], gram, grids[name], damp) for name, gram in grams.items()}
            walks = [_advanced(walk, i, {id(params[name]): leaf for name, leaf in new.items()}) for walk in walks]
            quantized = {**quantized, **new}
        params = {**params, **quantized}
        if head in grids:
            gram = _summed({head: _gram(model.hidden(params, batch, deltas)[batch.segment_ids > 0])} for batch in batches)[head]
            params = {**params, head: gptq_weight(params[head], gram, grids[head], damp)}
    unused = next((name for name in grids if isinstance(params[name], Tensor)), None)
    if unused is not None:
        raise InputError(
            f"calibrate: {unused} is used by no linear map of a block, expected one; except it or choose the method rtn"
        )
    return params


def gptq_weight(w: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], scheme: Int8 | Int4, damp: float) -> QInt8 | QInt4:
    """The leaf that makes |X (W - Q)^T| small, where gram = X^T X (Frantar et al. 2022, algorithm 1).

    The scale of a group is chosen when its first column is reached, from weights that already hold the earlier columns' errors.
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
                scale = scheme.scale(torch.cat([block, later[:, : max(0, group - block.shape[1])]], dim=1)[:, :group])
                scales.append(scale)
            level = scheme.levels(block[:, :1], scale)
            error = (block[:, :1] - level * scale) / factor[j, j]
            block = block[:, 1:] - error * factor[j, j + 1 : stop]
            levels.append(level)
            errors.append(error)
        later = later - torch.cat(errors, dim=1) @ factor[start:stop, stop:]
    return scheme.pack(torch.cat(levels, dim=1), torch.cat(scales, dim=1))


def _inverse_factor(gram: Float[Tensor, "in in"], damp: float) -> Float[Tensor, "in in"]:
    """Upper triangular U with U^T U = (gram + damp mean(diagonal) I)^-1, in float64; the identity where no input was seen."""
    wide = gram.double()
    mean = wide.diagonal().mean()
    damped = wide + torch.where(mean > 0, damp * mean, 1.0) * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _start(model: Model, params: Params, deltas: Deltas, batch: Batch) -> _Walk:
    """The batch before the first block: a forward whose blocks are noted down and not run."""
    calls: list[tuple[Params, Deltas, tuple[Any, ...]]] = []
    blocks: list[Callable[..., Tensor]] = []
    entering: list[Tensor] = []

    def noted(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def note(w: Params, d: Deltas, x: Tensor, *rest: Any) -> Tensor:
            blocks.append(block)
            entering.append(x)
            calls.append((w, d, rest))
            return x

        return note

    model.family.hidden(model.config, params, batch.tokens, deltas, segment_ids=batch.segment_ids, wrap=noted)
    return _Walk(blocks[0], calls, entering[0], batch.segment_ids > 0)


def _grams(walk: _Walk, i: int, names: Mapping[int, str]) -> dict[str, Tensor]:
    """X^T X over the real tokens for the weights of block i that `names` knows by the id of their leaf."""
    w, d, rest = walk.calls[i]
    # ops.linear casts a weight to the dtype of its input: done here first, so that it meets the very tensor that is looked for
    cast = {key: leaf.to(walk.x.dtype) if id(leaf) in names else leaf for key, leaf in w.items()}
    inputs = _LinearInputs({id(cast[key]): names[id(leaf)] for key, leaf in w.items() if id(leaf) in names}, walk.real)
    with inputs:
        walk.block(cast, d, walk.x, *rest)
    return inputs.grams


def _advanced(walk: _Walk, i: int, quantized: Mapping[int, Any]) -> _Walk:
    """The walk behind block i, whose leaves are replaced by id."""
    w, d, rest = walk.calls[i]
    return walk._replace(x=walk.block({key: quantized.get(id(leaf), leaf) for key, leaf in w.items()}, d, walk.x, *rest))


class _LinearInputs(TorchFunctionMode):
    """Sums X^T X of every F.linear whose weight is one of `names`, by id."""

    def __init__(self, names: Mapping[int, str], real: Bool[Tensor, "B T"]) -> None:
        super().__init__()
        self.names, self.real = names, real
        self.grams: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self.names:
            x = args[0]
            rows = x[self.real] if x.shape[:-1] == self.real.shape else x  # an expert's rows, which have left their places
            self.grams = _summed([self.grams, {self.names[id(args[1])]: _gram(rows)}])
        return func(*args, **(kwargs or {}))


def _gram(x: Float[Tensor, "n in"]) -> Float[Tensor, "in in"]:
    wide = x.float()
    return wide.T @ wide


def _summed(grams: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for one in grams:
        total = {**total, **{name: total[name] + gram if name in total else gram for name, gram in one.items()}}
    return total
