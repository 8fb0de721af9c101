"""Feed-forward of a block as a mixture of experts: its numbers, the names of its weights, and how
they are used.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from minitune import tree
from minitune.models.shapes import Dims, linear_dims
from minitune.nn import moe
from minitune.nn.elementwise import swiglu
from minitune.nn.shared_experts import mixture_of_ranks
from minitune.sharding.experts import EACH_ITS_PART, ExpertRanks, OwnerOf, OwnExperts
from minitune.types import Params, PositiveInt

ONE_OF_MANY = re.compile(r".*\.experts\.(\d+)\.")


class Names(NamedTuple):
    """Names of a layout's weights within a layer; {e} is an expert's number, and without it all
    experts share a tensor.
    """

    mlp: str  # of a layer without experts
    router: str
    into: tuple[str, ...]  # gate and up, or both in one
    out: str
    shared: str


NAMES = {
    "mixtral": Names(
        "block_sparse_moe",
        "block_sparse_moe.gate",
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        "block_sparse_moe.experts.{e}.w2.weight",
        "",
    ),
    "qwen": Names(
        "mlp",
        "mlp.gate",
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        "mlp.experts.{e}.down_proj.weight",
        "mlp.shared_expert",
    ),
    "gpt_oss": Names(
        "mlp", "mlp.router", ("mlp.experts.gate_up_proj",), "mlp.experts.down_proj", ""
    ),
    "llama4": Names(
        "feed_forward",
        "feed_forward.router",
        ("feed_forward.experts.gate_up_proj",),
        "feed_forward.experts.down_proj",
        "feed_forward.shared_expert",
    ),
}


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers of a mixture of experts, and what its router does. The pattern `layers` repeats
    over depth.
    """

    n_experts: PositiveInt  # experts of a layer
    n_active: PositiveInt  # experts that each token goes through
    d_ff: PositiveInt  # numbers between the two linear maps of one expert
    names: Literal["mixtral", "qwen", "gpt_oss", "llama4"]  # whose names the weights have
    # how a router's logits become weights of the chosen experts: softmax over all, then the largest
    # n_active; the largest, then softmax over these; or sigmoid of each
    router: Literal["softmax_then_top", "top_then_softmax", "top_then_sigmoid"] = "softmax_then_top"
    renormalised: bool = True  # the weights of softmax_then_top are divided by their sum
    # d_ff of one more expert, which every token goes through; none if absent
    d_shared: PositiveInt | None = None
    shared_gate: bool = False  # the shared expert is weighed by a sigmoid of the token
    bias: bool = False  # biases on the router and the experts
    limit: float = 7.0  # bound that gpt-oss's swiglu clamps its inputs to
    slope: float = 1.702  # factor within the sigmoid of gpt-oss's swiglu
    layers: tuple[bool, ...] = (True,)  # pattern over depth: true has experts, false a plain mlp

    def __post_init__(self) -> None:
        if self.n_active > self.n_experts:
            raise ValueError(f"n_active {self.n_active} is more than n_experts {self.n_experts}")
        if not self.layers:
            raise ValueError("layers is empty, expected a pattern such as [true]")

    def at(self, i: int) -> bool:
        """True if layer i has experts."""
        return self.layers[i % len(self.layers)]

    @property
    def mlp(self) -> str:
        """Name that the weights of a layer without experts begin with."""
        return NAMES[self.names].mlp


def expert_shapes(experts: Experts, d_model: int) -> dict[str, tuple[int, ...]]:
    """Weights of one layer's feed-forward by their names within the layer."""
    names, n, f = NAMES[experts.names], experts.n_experts, experts.d_ff
    weights: dict[str, tuple[int, ...]] = {f"{names.router}.weight": (n, d_model)}
    if experts.bias:
        weights[f"{names.router}.bias"] = (n,)
    if "{e}" in names.out:
        for e in range(n):
            weights |= {name.format(e=e): (f, d_model) for name in names.into}
            weights[names.out.format(e=e)] = (d_model, f)
    else:
        for name, in_, out in ((names.into[0], d_model, 2 * f), (names.out, f, d_model)):
            weights |= {name: (n, in_, out)} | ({f"{name}_bias": (n, out)} if experts.bias else {})
    if experts.d_shared is not None:
        weights |= {
            f"{names.shared}.{name}_proj.weight": (experts.d_shared, d_model)
            for name in ("gate", "up")
        }
        weights[f"{names.shared}.down_proj.weight"] = (d_model, experts.d_shared)
    if experts.shared_gate:
        weights[f"{names.shared}_gate.weight"] = (1, d_model)
    return weights


def expert_dims(experts: Experts) -> Dims:
    """Meanings of the dims of these weights; what is joined of gate and up is d_ff as well."""
    names = NAMES[experts.names]
    dims: dict[str, tuple[str, ...]] = {**linear_dims(names.router, "experts", "d_model")}
    if "{e}" in names.out:
        dims |= {name.format(e="*"): ("d_ff", "d_model") for name in names.into}
        dims[names.out.format(e="*")] = ("d_model", "d_ff")
    else:
        for name, in_, out in ((names.into[0], "d_model", "d_ff"), (names.out, "d_ff", "d_model")):
            dims |= {name: ("experts", in_, out), f"{name}_bias": ("experts", out)}
    for name in ("gate", "up"):
        dims[f"{names.shared}.{name}_proj.weight"] = ("d_ff", "d_model")
    dims[f"{names.shared}.down_proj.weight"] = ("d_model", "d_ff")
    dims[f"{names.shared}_gate.weight"] = ("one", "d_model")
    return dims


def is_routed(experts: Experts, w: Params) -> bool:
    """True if the leaves of a layer are those of a mixture."""
    return f"{NAMES[experts.names].router}.weight" in w


def router_weight(experts: Experts) -> str:
    """Name of the router's weight within a layer."""
    return f"{NAMES[experts.names].router}.weight"


def owners(experts: Experts, n_ranks: int) -> OwnerOf:
    """Rank of n_ranks that computes with a weight, by its name within a layer."""
    names = NAMES[experts.names]
    stacks = {f"{name}{end}" for name in (*names.into, names.out) for end in ("", "_bias")}

    def owner_of(name: str) -> int | None:
        if name in stacks:
            return EACH_ITS_PART
        found = ONE_OF_MANY.match(name)
        return None if found is None else int(found[1]) * n_ranks // experts.n_experts

    return owner_of


def routed_feed_forward(
    experts: Experts,
    w: Params,
    proj: Callable[[str, Tensor], Tensor],
    x: Float[Tensor, "B T D"],
    tap: Callable[[str, Tensor, Tensor], None] | None,
) -> Float[Tensor, "B T D"]:
    """Mixture's output, and that of the shared expert if there is one.

    w holds the layer's leaves; proj(name, x) is the linear map of one of them; tap is what block
    says.
    """
    names = NAMES[experts.names]
    routes = _routes(experts, proj(names.router, x).flatten(0, 1))
    w, ranks, leaves = _own(w)
    up = [_linear_maps(experts, name, w, tap, ranks) for name in names.into]
    down = _linear_maps(experts, names.out, w, tap, ranks)
    scale_input = experts.router == "top_then_sigmoid"
    maps = up, _activation(experts), down
    rows = x.flatten(0, 1)
    if ranks is None:
        y = moe.mixture(rows, routes, *maps, scale_input=scale_input)
    else:
        how: dict[str, Any] = {"scale_input": scale_input, "leaves": leaves}
        y = mixture_of_ranks(rows, routes, *maps, ranks, **how)
    y = y.unflatten(0, x.shape[:2])
    if experts.d_shared is None:
        return y
    hidden = swiglu(proj(f"{names.shared}.gate_proj", x), proj(f"{names.shared}.up_proj", x))
    shared = proj(f"{names.shared}.down_proj", hidden)
    return y + (
        torch.sigmoid(proj(f"{names.shared}_gate", x)) * shared if experts.shared_gate else shared
    )


def _routes(experts: Experts, logits: Tensor) -> moe.Routes:
    if experts.router == "top_then_softmax":
        return moe.top_then_softmax(logits, experts.n_active)
    if experts.router == "top_then_sigmoid":
        return moe.top_then_sigmoid(logits, experts.n_active)
    return moe.softmax_then_top(logits, experts.n_active, experts.renormalised)


def _own(w: Params) -> tuple[Params, ExpertRanks | None, Sequence[Tensor]]:
    """(leaves of a layer as they multiply, the ranks that share its experts, all tensors of experts
    that train on any of them).
    """
    shared = {name: leaf for name, leaf in w.items() if isinstance(leaf, OwnExperts)}
    if not shared:
        return w, None, ()
    own: Mapping[str, Any] = {name: leaf.w for name, leaf in shared.items()}
    tensors = tree.leaves(dict(own))
    return {**w, **own}, next(iter(shared.values())).ranks, tensors


def _linear_maps(
    experts: Experts,
    name: str,
    w: Params,
    tap: Callable[[str, Tensor, Tensor], None] | None,
    ranks: ExpertRanks | None,
) -> moe.ExpertLinear:
    """One linear map of every expert that this rank computes with."""
    if "{e}" not in name:
        return moe.stacked(w[name], w.get(f"{name}_bias"))
    numbers = range(experts.n_experts) if ranks is None else ranks.own(experts.n_experts)
    each = [name.format(e=e) for e in numbers]
    taps = [None if tap is None else partial(tap, one) for one in each]
    return moe.ExpertLinear([w[one] for one in each], [None] * len(each), taps)


def _activation(experts: Experts) -> Callable[..., Any]:
    """Function that turns the results of the first maps into the input of the last."""
    if experts.names == "gpt_oss":
        return lambda y: moe.clamped_swiglu(y[..., ::2], y[..., 1::2], experts.limit, experts.slope)
    return swiglu if len(NAMES[experts.names].into) == 2 else lambda y: swiglu(*y.chunk(2, dim=-1))
