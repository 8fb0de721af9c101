"""Bytes that a rank sends in a step, and how fast they go.

A ring of n sends (n - 1)/n of what it gathers or scatters from each rank, and twice that of what it
sums everywhere (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002, section 3).
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from minitune import hardware
from minitune.planning.alike import layer_number
from minitune.planning.devices import Device
from minitune.planning.mesh import EXPERT, TENSOR, Mesh, Route
from minitune.planning.rank_leaves import bytes_by_route
from minitune.planning.step_spec import StepSpec
from minitune.sharding.mesh import ROW_SHARING

Purpose = Literal["gathered", "scattered", "summed", "exchanged"]


class Traffic(NamedTuple):
    """Bytes that each rank sends in an optimizer step."""

    gathered: float  # weights, for every forward and, of the blocks, for their backward
    scattered: float  # gradients, after every backward
    summed: float  # gradients between copies, once
    exchanged: float = 0.0  # activations, between ranks that work on the same rows


class RankGroup(NamedTuple):
    """Ranks that send to one another: every stride-th of a mesh."""

    n_ranks: int
    stride: int = 1


class Transfer(NamedTuple):
    """Bytes that a rank sends to the others of a group in a step."""

    purpose: Purpose
    group: RankGroup
    n_bytes: float
    to_each: bool = False  # other bytes to each rank, and not one after the other around a ring


def traffic(step: StepSpec) -> Traffic:
    """Traffic of a step, the forwards of a reference or a teacher left out."""
    return summed_up(transfers(step))


def summed_up(found: Iterable[Transfer]) -> Traffic:
    """Traffic of these transfers."""
    sent = dict.fromkeys(Traffic._fields, 0.0)
    for one in found:
        sent[one.purpose] += one.n_bytes
    return Traffic(**sent)


def transfers(step: StepSpec) -> list[Transfer]:
    """Everything that a rank sends in a step, the forwards of a reference or a teacher left out.

    Weights travel as they are multiplied, gradients in float32 or wider.
    """
    return [*_of_weights(step), *_exchanges(step)]


def _of_weights(step: StepSpec) -> Iterator[Transfer]:
    """Transfers of weights and of their gradients."""
    mesh, n = step.mesh, step.n_micro_batches
    weights = bytes_by_route(step.params, mesh)
    of_blocks = bytes_by_route(_of_blocks(step.params), mesh)
    for found in (weights, of_blocks):
        for (axes, route), n_bytes in found.items():
            yield from _along_route("gathered", mesh, axes, route, n * n_bytes)
    for (axes, route), n_bytes in bytes_by_route(step.trainable, mesh, wide=True).items():
        yield from _along_route("scattered", mesh, axes, route, n * n_bytes)
        yield from _copies(mesh, axes, n_bytes)


def axis_group(mesh: Mesh, axis: str) -> RankGroup:
    """Ranks along an axis: neighbours along the last one are neighbours in the order of ranks."""
    names = [*mesh.axes]
    inner = names[names.index(axis) + 1 :]
    return RankGroup(mesh.axes[axis], math.prod(mesh.axes[one] for one in inner))


def link(group: RankGroup, device: Device) -> float:
    """Bytes a second that a rank sends to the others of its group.

    Ranks fill node after node. Where a group spans nodes, as many rings as it has ranks in a node
    pass from node to node, each through a network card of its own.
    """
    if group.n_ranks * group.stride <= device.n_per_node:
        return device.link_bytes_per_s
    n_in_node = max(1, device.n_per_node // group.stride)
    return min(device.link_bytes_per_s, device.node_bytes_per_s * n_in_node)


def sending_rate(one: Transfer, device: Device) -> float:
    """Bytes a second at which a rank makes a transfer: what it sends to each rank of another node
    passes through its own network card."""
    group = one.group
    n_in_node = max(1, device.n_per_node // group.stride)
    if not one.to_each or group.n_ranks <= n_in_node:
        return link(group, device)
    to_other_nodes = (group.n_ranks - n_in_node) / (group.n_ranks - 1)
    return min(device.link_bytes_per_s, device.node_bytes_per_s / to_other_nodes)


def sending_s(found: Iterable[Transfer], purposes: Collection[Purpose], device: Device) -> float:
    """Seconds of these transfers, one after the other, as far as they have one of the purposes."""
    chosen = [one for one in found if one.purpose in purposes]
    return sum((one.n_bytes / sending_rate(one, device) for one in chosen), 0.0)


def _along_route(
    purpose: Purpose, mesh: Mesh, axes: Collection[str], route: Route, n_bytes: int
) -> Iterator[Transfer]:
    """Transfers of leaves that come together along one axis after the other, or whose gradients go
    the other way round. n_bytes: of the whole leaves, which `axes` cut.

    Along "expert" a rank sends its part of each expert's weight to the rank of that expert, and
    none of its own. Their gradients are as much, because all ranks have as many experts.
    """
    part = n_bytes / math.prod(mesh.axes[axis] for axis in axes)
    for axis in route.along:
        group = axis_group(mesh, axis)
        if axis != EXPERT or route.owner is None:
            yield Transfer(purpose, group, (group.n_ranks - 1) * part)
        elif route.is_elsewhere:
            yield Transfer(purpose, group, part, to_each=True)
        part = group.n_ranks * part


def _copies(mesh: Mesh, axes: Collection[str], n_bytes: int) -> Iterator[Transfer]:
    """Transfers of the sums of gradients: of leaves that no axis cuts between all ranks, of others
    along the axes that do not cut them."""
    if not axes:
        yield Transfer("summed", RankGroup(mesh.n_ranks), _summed(n_bytes, mesh.n_ranks))
        return
    part = n_bytes / math.prod(mesh.axes[axis] for axis in axes)
    for axis, n in mesh.axes.items():
        if axis not in axes:
            yield Transfer("summed", axis_group(mesh, axis), _summed(part, n))


def _exchanges(step: StepSpec) -> Iterator[Transfer]:
    """Transfers of activations between ranks that share rows or experts, in all micro-batches."""
    mesh, passes = step.mesh, _passes_by_layer(step)
    n_bytes = {
        "context": sum(passes) * _of_context(step),
        TENSOR: _shared_maps(step, passes) * _of_tensor(step),
        EXPERT: _mixtures(step, passes) * _of_experts(step),
    }
    # the losses of all tokens on every rank, and their gradients back: along tensor, then context
    n_losses = 2 * 4 * _own_tokens(step)
    for axis in reversed(ROW_SHARING):
        n = mesh.n_sharing(axis)
        n_bytes[axis] += n_losses * (n - 1)
        n_losses = n_losses * n
    for axis, of_axis in n_bytes.items():
        if mesh.n_sharing(axis) > 1:
            yield Transfer("exchanged", axis_group(mesh, axis), of_axis, to_each=True)


def _of_context(step: StepSpec) -> float:
    """Bytes that a rank sends along "context" in a pass through one block.

    Each of c ranks has t tokens of B rows: before attention queries, keys and values of its tokens,
    B t (N + 2 K) numbers of d_head, for N and K heads, of which it keeps those for its own heads,
    1/c; after attention B t N, likewise. That is B t (2 N + 2 K) d_head (c - 1)/c. K are the key
    heads as sent, each as often as there are ranks that need it. With "tensor" as well, each rank
    of that axis does so with its heads of the tokens of all.
    """
    config, c = step.model.config, step.mesh.n_sharing("context")
    n_heads = 2 * config.n_heads + 2 * _sent_key_heads(config.n_heads, config.n_kv_heads, c)
    return _own_tokens(step) * n_heads * config.d_head * _itemsize(step) * (c - 1) / c


def _of_tensor(step: StepSpec) -> float:
    """Bytes that a rank sends along "tensor" in a pass through the maps of one input and the map
    after them, which is cut by columns.

    Each of s ranks has t tokens of B rows between blocks. It gathers the input, and scatters the
    sum of what the last map makes: each of the two sends (s - 1) B t d_model numbers.
    """
    n_others = step.mesh.n_sharing(TENSOR) - 1
    return 2.0 * n_others * _own_tokens(step) * step.model.config.d_model * _itemsize(step)


def _of_experts(step: StepSpec) -> float:
    """Bytes that a rank sends along "expert" in a pass through one mixture, where tokens are spread
    evenly over experts. How many rows there are is told before, in a few bytes that do not count.

    A row of d_model numbers goes to each of the k experts of a token, and comes back as one; of n
    ranks that have them, (n - 1)/n are others.
    """
    config, n = step.model.config, step.mesh.n_sharing(EXPERT)
    k = 0 if config.experts is None else config.experts.n_active
    return 2 * _own_tokens(step) * k * config.d_model * _itemsize(step) * (n - 1) / n


def _shared_maps(step: StepSpec, passes: Sequence[int]) -> int:
    """Number of passes through maps that are cut by columns along "tensor"."""
    cut_maps = (layer_number(name) for name, cut in step.mesh.cuts.items() if cut.get(TENSOR) == 1)
    return sum(passes[layer] for layer in cut_maps if layer is not None)


def _mixtures(step: StepSpec, passes: Sequence[int]) -> int:
    """Number of passes through mixtures of experts."""
    experts = step.model.config.experts
    return 0 if experts is None else sum(n for i, n in enumerate(passes) if experts.at(i))


def _own_tokens(step: StepSpec) -> int:
    """Tokens of a rank in a step."""
    return step.n_micro_batches * step.n_rows * step.mesh.own_tokens(step.n_tokens)


def _itemsize(step: StepSpec) -> int:
    """Bytes of a number of the activations."""
    like = step.params["model.embed_tokens.weight"]
    return hardware.product_dtype(like.dtype, step.device).itemsize


def _passes_by_layer(step: StepSpec) -> list[int]:
    """Number of passes through each block that send: its forward, its backward if it or one before
    it trains, which sends the gradient of all that the forward did, and what that computes again.
    """
    n = step.model.config.n_layers
    trained = [layer_number(name) for name in step.trainable]
    first = min((layer for layer in trained if layer is not None), default=n)
    if "model.embed_tokens.weight" in step.trainable:
        first = 0
    return [1 + (i >= first) + (first <= i < step.model.n_remat) for i in range(n)]


def _sent_key_heads(n_heads: int, n_kv_heads: int, c: int) -> int:
    """Key heads that are sent, the fewest of which each of c ranks gets as many, in the order of
    its query heads."""
    fits = (n for n in range(n_kv_heads, n_heads + 1, n_kv_heads) if n % c == 0 == n_heads % n)
    return next(fits)


def _summed(n_bytes: float | int, n: int) -> float:
    """Bytes that each of n sends so that all have the sum."""
    return 2 * (n - 1) / n * n_bytes


def _of_blocks(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of the blocks, which are gathered twice."""
    return {name: leaf for name, leaf in leaves.items() if layer_number(name) is not None}
