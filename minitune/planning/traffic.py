"""Bytes that a rank sends in a step, and how fast they go.

A ring of n sends (n - 1)/n of what it gathers or scatters from each rank, and twice that of what it
sums everywhere (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002, section 3).
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from minitune import hardware
from minitune.planning.alike import layer_number
from minitune.planning.devices import Device
from minitune.planning.mesh import TENSOR, Mesh, bytes_by_cut
from minitune.planning.step_spec import StepSpec

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
    return [*_of_weights(step), *(_exchanges(step) if step.mesh.n_sharers > 1 else ())]


def _of_weights(step: StepSpec) -> Iterator[Transfer]:
    """Transfers of weights and of their gradients."""
    mesh, n = step.mesh, step.n_micro_batches
    weights = bytes_by_cut(step.params, mesh)
    of_blocks = bytes_by_cut(_of_blocks(step.params), mesh)
    for found in (weights, of_blocks):
        for (axes, gathered), n_bytes in found.items():
            yield from _along_axes("gathered", mesh, axes, gathered, n * n_bytes)
    for (axes, gathered), n_bytes in bytes_by_cut(step.trainable, mesh, wide=True).items():
        yield from _along_axes("scattered", mesh, axes, gathered, n * n_bytes)
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


def sending_s(found: Iterable[Transfer], purposes: Collection[Purpose], device: Device) -> float:
    """Seconds of these transfers, one after the other, as far as they have one of the purposes."""
    chosen = [one for one in found if one.purpose in purposes]
    return sum((one.n_bytes / link(one.group, device) for one in chosen), 0.0)


def _along_axes(
    purpose: Purpose, mesh: Mesh, axes: Collection[str], gathered: Collection[str], n_bytes: int
) -> Iterator[Transfer]:
    """Transfers of leaves that are put together along one axis after the other, the outermost
    first, or scattered the other way round. n_bytes: of the whole leaves, which `axes` cut."""
    part = n_bytes / math.prod(mesh.axes[axis] for axis in axes)
    for axis in gathered:
        group = axis_group(mesh, axis)
        yield Transfer(purpose, group, (group.n_ranks - 1) * part)
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
    """Transfers of activations between ranks that work on the same rows, in all micro-batches.

    Along "context", c ranks have t tokens each, of B rows: before attention each has queries, keys
    and values of its tokens, B t (N + 2 K) numbers of d_head, for N and K heads, and keeps those
    for its own heads, which are 1/c; after attention B t N, likewise. So it sends
    B t (2 N + 2 K) d_head (c - 1)/c in a block. K are the key heads as sent, each as often as there
    are ranks that need it. Losses of tokens, 4 B t bytes, go to every other rank.

    Along "tensor", s ranks have t tokens each between blocks: a block gathers its input before
    attention and before its feed-forward, and scatters the sum of what these make. Each of the four
    sends (s - 1) B t d_model.

    A backward sends the gradient of all that its forward did, and once more what it computes again.
    """
    mesh, config = step.mesh, step.model.config
    like = step.params["model.embed_tokens.weight"]
    itemsize = hardware.product_dtype(like.dtype, step.device).itemsize
    n_own = step.n_micro_batches * step.n_rows * mesh.own_tokens(step.n_tokens)
    passes = _passes(step)
    c, s = mesh.n_sharing("context"), mesh.n_sharing(TENSOR)
    if c > 1:
        # with both axes, each rank of "tensor" exchanges its part of the heads for all tokens
        n_heads = 2 * config.n_heads + 2 * _sent_key_heads(config.n_heads, config.n_kv_heads, c)
        of_block = n_own * n_heads * config.d_head * itemsize * (c - 1) / c
        of_losses = 2 * 4 * n_own * (c - 1)
        yield Transfer("exchanged", axis_group(mesh, "context"), passes * of_block + of_losses)
    if s > 1:
        of_block = 4 * (s - 1) * n_own * config.d_model * itemsize
        yield Transfer("exchanged", axis_group(mesh, TENSOR), passes * of_block)


def _passes(step: StepSpec) -> int:
    """Number of passes through blocks: every forward, the backward from the last block down to the
    first that trains, and what that computes again."""
    n = step.model.config.n_layers
    layers = [layer_number(name) for name in step.trainable]
    inner = [layer for layer in layers if layer is not None]
    first = min(inner, default=n)
    if "model.embed_tokens.weight" in step.trainable:
        first = 0
    return n + (n - first) + max(0, step.model.n_remat - first)


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
