"""Bytes that a rank sends in a step, and how fast they go.

A ring of n sends (n - 1)/n of what it gathers or scatters from each rank, and twice that of what it
sums everywhere (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002, section 3).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minitune import tree
from minitune.planning.alike import layer_number
from minitune.planning.devices import Device
from minitune.planning.mesh import Mesh
from minitune.planning.step_spec import StepSpec
from minitune.types import Delta, wide_dtype


class Traffic(NamedTuple):
    """Bytes that each rank sends in an optimizer step."""

    gathered: float  # weights, for every forward and for what is computed again
    scattered: float  # gradients, after every backward
    summed: float  # gradients between copies, once


def traffic(step: StepSpec) -> Traffic:
    """Traffic of a step, the forwards of a reference or a teacher left out.

    Weights travel as they are multiplied, gradients in float32 or wider.
    """
    n, copies = step.mesh
    deltas = {name: leaf for name, leaf in step.trainable.items() if isinstance(leaf, Delta)}
    once = tree.n_bytes((step.params, deltas))
    again = tree.n_bytes([_again(step, step.params), _again(step, deltas)])
    gradients = sum(
        leaf.numel() * wide_dtype(leaf.dtype).itemsize for leaf in tree.leaves(step.trainable)
    )
    sent_once = (n - 1) / n
    in_micro_batches = step.n_micro_batches * sent_once
    return Traffic(
        (once + again) * in_micro_batches,
        gradients * in_micro_batches,
        2 * (copies - 1) / copies * gradients / n,
    )


def shard_link(mesh: Mesh, device: Device) -> float:
    """Bytes a second that a rank sends to those that it divides weights with.

    Ranks of one group fill node after node. Where a group spans nodes, as many rings as it has
    ranks in a node pass from node to node, each through a network card of its own.
    """
    if mesh.n_shards <= device.n_per_node:
        return device.link_bytes_per_s
    return min(device.link_bytes_per_s, device.node_bytes_per_s * device.n_per_node)


def replica_link(mesh: Mesh, device: Device) -> float:
    """Bytes a second that a rank sends to the copies of its part."""
    if mesh.n_ranks <= device.n_per_node:
        return device.link_bytes_per_s
    n_in_node = max(1, device.n_per_node // mesh.n_shards)
    return min(device.link_bytes_per_s, device.node_bytes_per_s * n_in_node)


def _again(step: StepSpec, leaves: Mapping[str, Any]) -> list[Any]:
    """Leaves of the blocks that are computed again, which gather them twice."""
    return [
        leaf
        for name, leaf in leaves.items()
        if (layer := layer_number(name)) is not None and layer < step.model.n_remat
    ]
