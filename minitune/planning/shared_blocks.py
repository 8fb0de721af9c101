"""Blocks that several ranks share, on one rank without the others: there is no process group, so on
fake tensors alone.
"""

from typing import Any

import torch
from torch import Tensor

from minitune.models.model import Model
from minitune.models.weights import shapes
from minitune.planning.alike import layer_number
from minitune.planning.mesh import EXPERT, TENSOR, Mesh
from minitune.sharding.experts import ExpertRanks, own_experts
from minitune.sharding.tensor_parallel import of_rank
from minitune.sharding.tokens import AxisMember, Sharers, TokenShares
from minitune.types import Params


def token_shares(mesh: Mesh) -> TokenShares | None:
    """Shares of the first rank of a mesh; None where it has rows of its own."""
    context, tensor = (_first_along(axis, mesh) for axis in ("context", TENSOR))
    shares = TokenShares(context, tensor)
    return None if shares.size == 1 else shares


def with_shared_blocks(model: Model, mesh: Mesh) -> Model:
    """Model whose blocks are given leaves as rank_leaves.used_leaf gives them, and compute with
    those as the blocks of the first rank of a mesh do (sharding/gather.py).
    """
    tensor, expert = _first_along(TENSOR, mesh), _first_along(EXPERT, mesh)
    if tensor is None and expert is None:
        return model
    # by the name within a layer: the dim that the axis tensor cuts, and its size
    sizes = shapes(model.config)
    cut = {
        name.split(".", 3)[3]: (dims[TENSOR], sizes[name][dims[TENSOR]])
        for name, dims in mesh.cuts.items()
        if TENSOR in dims and layer_number(name) is not None
    }

    def block(config: Any, mixer: Any, w: Params, x: Tensor, inputs: Any) -> Tensor:
        own: Params = w
        if tensor is not None:
            own = {
                name: of_rank(leaf, *cut[name], tensor) if name in cut else leaf
                for name, leaf in own.items()
            }
        if expert is not None:
            own = own_experts(own, mesh.owner_of, ExpertRanks(*expert))
        return model.block(config, mixer, own, x, inputs)

    return model._replace(block=block)


def _first_along(axis: str, mesh: Mesh) -> AxisMember | None:
    """First rank along an axis; None if it is alone there."""
    n = mesh.n_sharing(axis)
    if n == 1:
        return None
    name = torch.empty(0, dtype=torch.uint8)
    return AxisMember(0, Sharers(torch.empty(n, dtype=torch.int64), name))
