"""Bytes that a rank sends in a step, and how fast they go.

A ring of n sends (n - 1)/n of what it gathers or scatters from each rank, and twice that of what it
sums everywhere (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002, section 3).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minitune import tree
from minitune.planning.alike import layer_number
from minitune.planning.devices import Device
from minitune.planning.mesh import Mesh, divided_bytes
from minitune.planning.step_spec import StepSpec
from minitune.types import wide_dtype


class Traffic(NamedTuple):
    """Bytes that each rank sends in an optimizer step."""

    gathered: float  # weights, for every forward and, of the blocks, for their backward
    scattered: float  # gradients, after every backward
    summed: float  # gradients between copies, once


def traffic(step: StepSpec) -> Traffic:
    """Traffic of a step, the forwards of a reference or a teacher left out.

    Weights travel as they are multiplied, gradients in float32 or wider.
    """
    mesh = step.mesh
    weights = divided_bytes(step.params, mesh) + divided_bytes(_of_blocks(step.params), mesh)
    wide = tree.map(lambda x: x.to("meta", wide_dtype(x.dtype)), step.trainable)
    gradients = divided_bytes(wide, mesh)
    on_all = tree.n_bytes(wide) - gradients
    in_micro_batches = step.n_micro_batches * (mesh.n_shards - 1) / mesh.n_shards
    return Traffic(
        weights * in_micro_batches,
        gradients * in_micro_batches,
        _summed(gradients / mesh.n_shards, mesh.n_replicas) + _summed(float(on_all), mesh.n_ranks),
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


def _summed(n_bytes: float, n: int) -> float:
    """Bytes that each of n sends so that all have the sum."""
    return 2 * (n - 1) / n * n_bytes


def _of_blocks(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of the blocks, which are gathered twice."""
    return {name: leaf for name, leaf in leaves.items() if layer_number(name) is not None}
