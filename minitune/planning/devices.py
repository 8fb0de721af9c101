"""Devices that a plan is made for: what they hold and how fast they are, from configs/devices."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from minitune.errors import InputError, cut, nearest
from minitune.io import paths, toml
from minitune.io.toml_messages import KeyPath, shown
from minitune.types import PositiveFloat, PositiveInt

FOLDER = "devices"
PeakShare = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures of one device, and of the links between several."""

    kind: Literal["cpu", "cuda", "mps", "xpu"]  # as torch calls it
    memory_bytes: Annotated[int, msgspec.Meta(gt=0)]
    memory_bytes_per_s: PositiveFloat  # read and written together
    # of dense matrix products, by the dtype of their factors
    flops_per_s: dict[str, PositiveFloat]
    # that a device sends to the others of its node, in one direction
    link_bytes_per_s: PositiveFloat
    # that a device sends to other nodes, in one direction
    node_bytes_per_s: PositiveFloat
    n_per_node: PositiveInt  # devices of a node
    # from the host's memory to a device, in one direction; absent where that is not known
    host_bytes_per_s: PositiveFloat | None = None
    # of reading a model's files anew; absent before `plan --measure` of a program that reads one
    disk_bytes_per_s: PositiveFloat | None = None
    attained: PeakShare  # part of flops_per_s that trainings are known to reach

    def rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of products of a dtype; those of float32 where the
        device has none of its own."""
        return self.flops_per_s.get(str(dtype).removeprefix("torch."), self.flops_per_s["float32"])


def names() -> list[str]:
    """Names of the devices in configs/devices."""
    known = [name.split("/") for name in paths.shipped("configs")]
    return [parts[1] for parts in known if parts[0] == FOLDER]


def open_device(name: str) -> Device:
    """Device by its name or the path of its TOML file; InputError for one that is not known."""
    if name in names():
        return read_device(paths.locate(f"configs/{FOLDER}/{name}.toml"))
    if Path(name).suffix == ".toml":
        return read_device(Path(name))
    known = ", ".join(names())
    raise InputError(
        f"plan: the device {cut(name)} is not known, expected one of {known}, or a TOML file like "
        f"those in configs/devices{nearest(name, names())}"
    )


def read_device(path: Path) -> Device:
    """Device of a TOML file; InputError for what is wrong with it."""

    def where(key: KeyPath) -> str:
        return f"plan: {path}: {shown(key)}" if key else f"plan: {path}"

    raw: dict[str, Any] = toml.read(path, "plan")[1]
    device = toml.decode(raw, Device, where)
    if "float32" not in device.flops_per_s:
        raise InputError(
            f"{where(('flops_per_s',))} has no float32, expected the rate of float32 products; "
            "add it"
        )
    return device
