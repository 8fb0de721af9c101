"""What each rank of tensor parallelism holds, sees and computes: run by the ranks of a test."""

from typing import Any
from unittest.mock import patch

import msgspec
import torch
from torch import Tensor

from minitune import tree
from minitune.errors import InputError
from minitune.losses.token import cross_entropy
from minitune.models.block import block
from minitune.models.config import DecoderConfig
from minitune.models.draws import Draws
from minitune.models.mixers import grouped_query
from minitune.models.weights import dims
from minitune.quant.schemes import NF4, quantize
from minitune.sharding.mesh import device_mesh
from minitune.sharding.parts import local_parts
from minitune.sharding.placements import shard
from minitune.sharding.plans import named_plan
from minitune.sharding.tensor_parallel import ColumnParallel, RowParallel
from minitune.sharding.tokens import shares_of
from support.models import SMALL, model_of, random_batch, random_deltas, random_params
from support.sharded import RULE

MESH = {"data": 1, "tensor": 2}
PLAN = named_plan("tp_fsdp")


def sharing(params: Any, mesh: dict[str, int], config: DecoderConfig = SMALL) -> tuple[Any, Any]:
    """(model, parameters in parts) of this rank."""
    devices = device_mesh(mesh, "cpu")
    return model_of(config)._replace(shares=shares_of(devices)), shard(params, dims(config), PLAN, devices)


def sizes_that_are_seen(n_tokens: int, mesh: dict[str, int]) -> dict[str, Any]:
    """Tokens and heads in blocks and attention, shapes of the maps there, numbers at rest, and tokens of what a model gives."""
    seen: dict[str, Any] = {"block": set(), "attention": set(), "maps": {}}
    attend = grouped_query.attention

    def watched_block(config: Any, mixer: Any, w: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
        seen["block"].add(x.shape[1])
        for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight"):
            assert isinstance(w[name], ColumnParallel | RowParallel)
            seen["maps"][name] = tuple(w[name].w.shape)
        return block(config, mixer, w, x, *rest, **kwargs)

    def watched_attention(q: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        seen["attention"].add((q.shape[1], q.shape[2]))
        return attend(q, *rest, **kwargs)

    model, params = sharing(random_params(SMALL), mesh)
    model, rows = model._replace(block=watched_block), random_batch(SMALL, 2, n_tokens)
    with patch.object(grouped_query, "attention", watched_attention):
        seen["hidden"] = model.hidden(params, rows).shape[1]
        seen["logits"] = model.forward(params, rows.tokens).shape[1]
    parts = local_parts({name: w for name, w in params.items() if w.ndim > 1})
    seen["at rest"] = sum(x.numel() for x in tree.leaves(parts))
    return seen


def plain_and_compiled_losses() -> tuple[Tensor, Tensor]:
    """Losses of tokens by blocks that are not compiled and by compiled ones."""
    model, params = sharing(random_params(SMALL), MESH)
    rows = random_batch(SMALL, 2, 11)
    compiled = model._replace(block_transform=lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    return model.token_losses(params, rows, cross_entropy), compiled.token_losses(params, rows, cross_entropy)


def losses_with_dropout(mesh: dict[str, int] | None, n_tokens: int) -> Tensor:
    """Losses of rows whose low-rank changes drop their inputs, on ranks that share maps or in one process."""
    params, rows = random_params(SMALL), random_batch(SMALL, 2, n_tokens)
    model, parts = (model_of(SMALL), params) if mesh is None else sharing(params, mesh)
    adapted = RULE.apply(parts, random_deltas(params, RULE))
    drawing = model._replace(draws=Draws(torch.tensor([5, 9]), (0.5,)))
    return drawing.token_losses(adapted, rows, cross_entropy)


def refusals() -> list[str]:
    """What is said to weights that ranks can't share: codes of NF4, and whole weights in a model whose ranks share maps."""
    even = msgspec.structs.replace(SMALL, d_ff=32)
    coded = {name: quantize(w, NF4()) if name.endswith("_proj.weight") else w for name, w in random_params(even).items()}
    found = []
    try:
        sharing(coded, MESH, even)
    except InputError as error:
        found.append(str(error))
    model, _ = sharing(random_params(SMALL), MESH)
    try:
        model.hidden(random_params(SMALL), random_batch(SMALL, 1, 4))
    except TypeError as error:
        found.append(str(error))
    return found
