"""Frozen blocks that are kept off the device, as a plan counts them."""

from typing import Any

from minitune import tree
from minitune.planning.alike import layer_number
from minitune.planning.devices import Device
from minitune.planning.step_spec import BlockPlace, StepSpec
from minitune.types import Params

AT_A_TIME = 2  # blocks that are on the device: one computes, and one is on its way


def resident(params: Params, place: BlockPlace) -> Params:
    """Weights that stay on the device."""
    if place == "device":
        return params
    return {name: w for name, w in params.items() if not _may_leave(name, w)}


def arriving_bytes(step: StepSpec) -> int:
    """Bytes of the frozen blocks that are on the device at a time, the largest ones."""
    blocks = [*_bytes_by_layer(step.params, step.blocks).values()]
    if step.teacher is not None:
        blocks += _bytes_by_layer(step.teacher.params, step.teacher_blocks).values()
    return AT_A_TIME * max(blocks, default=0)


def fetched_bytes(step: StepSpec) -> int:
    """Bytes of frozen blocks that come to the device in a step: for each forward and its backward,
    those of a reference or a teacher left out.
    """
    of_all = sum(_bytes_by_layer(step.params, step.blocks).values())
    return 2 * step.n_micro_batches * of_all


def fetch_rate(place: BlockPlace, device: Device) -> float | None:
    """Bytes a second at which blocks come from where they lie; None where that is not known."""
    if place == "host" or device.disk_bytes_per_s is None:
        return device.host_bytes_per_s if place == "host" else None
    return min(device.disk_bytes_per_s, device.host_bytes_per_s or device.disk_bytes_per_s)


def _bytes_by_layer(params: Params, place: BlockPlace) -> dict[int, int]:
    """Bytes of each layer's weights that are kept off the device."""
    by_layer: dict[int, int] = {}
    for name, w in params.items():
        layer = layer_number(name)
        if place != "device" and layer is not None and _may_leave(name, w):
            by_layer[layer] = by_layer.get(layer, 0) + tree.n_bytes(w)
    return by_layer


def _may_leave(name: str, w: Any) -> bool:
    return layer_number(name) is not None and len(w.shape) > 1
