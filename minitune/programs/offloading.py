"""Frozen weights of a model's blocks that a program keeps off the device: which, and where they lie
instead.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minitune import hardware, tree
from minitune.checkpoint.hf_weights import weight_slices
from minitune.errors import InputError
from minitune.models.config import DecoderConfig
from minitune.models.weights import block_matrices
from minitune.programs.log import Log
from minitune.sharding.offloaded import Carrier, FileSlice, OffloadedTensor, carrier
from minitune.tree import Tree
from minitune.types import Trainable

# where the blocks of a model lie that are not on its device
OffloadPlace = Literal["host", "disk"]
NO_SLICES: Mapping[str, FileSlice] = MappingProxyType({})


class Offloading(NamedTuple):
    """Blocks of a model that are kept off its device."""

    place: OffloadPlace
    names: frozenset[str]  # of the weights
    device: torch.device
    carrier: Carrier  # one for all, whose copies share a stream

    def leaf(
        self,
        name: str,
        w: Tree,
        dtype: torch.dtype | None = None,
        slices: Mapping[str, FileSlice] = NO_SLICES,
    ) -> Tree:
        """Leaf that stands for a dense or quantized weight w of the host in a dtype, or in its own.

        slices: files that hold its tensors, by their paths in {name: w}; others stay in the host's
        memory, ready to be copied.
        """
        leaves = []
        for path, x in tree.items({name: w}):
            kind = x.dtype if dtype is None else dtype
            source = slices.get(path)
            source = self._kept(x.to(kind)) if source is None else source
            leaves.append(OffloadedTensor(source, self.device, kind, self.carrier))
        return tree.rebuild(w, leaves)

    def _kept(self, x: Tensor) -> Tensor:
        """x in the host's memory, pinned where the device copies by itself."""
        x = x.contiguous()
        return hardware.pinned(x) if hardware.capabilities(self.device).streams else x


def of_model(
    place: OffloadPlace | None, config: DecoderConfig, device: torch.device, log: Log | None
) -> Offloading | None:
    """Offloading of the blocks of a model, of which the log says so; None for weights that lie on
    the host anyway.
    """
    off, said = None, f"offload = '{place}' changes nothing on a cpu, whose memory is the host's"
    if place == "disk" or (place == "host" and hardware.is_accelerator(device)):
        off = Offloading(place, block_matrices(config), device, carrier(device))
        where = "wait in the host's memory" if place == "host" else "are read from the disk"
        said = f"frozen blocks {where}, and come one block ahead"
    if log is not None and place is not None:
        log.say(f"model: {said}")
    return off


def frozen_names(
    place: OffloadPlace | None, config: DecoderConfig, trainable: Trainable
) -> frozenset[str]:
    """Weights of a model that are kept off the device; InputError for one that its deltas train
    whole.
    """
    if place is None:
        return frozenset()
    names = block_matrices(config)
    whole = {name for name, leaf in trainable.items() if isinstance(leaf, Tensor)}
    require_frozen(whole, names, "[model] deltas")
    return names


def offloaded(
    off: Offloading | None,
    stored: Mapping[str, Tree],
    dense: Set[str],
    folder: Path | None,
    dtype: torch.dtype,
) -> dict[str, Tree]:
    """Leaves in the dtype of compute for those of the dense weights that are kept off the device.

    InputError for one that is to be read from the disk and does not lie there by itself.
    """
    if off is None:
        return {}
    names = off.names & dense
    slices = NO_SLICES
    if off.place == "disk" and folder is not None:
        slices = weight_slices(folder, names)
    return {name: off.leaf(name, stored[name], dtype, slices) for name in names}


def refuse_random(place: OffloadPlace | None, config: str | None) -> None:
    """InputError for random weights that are to be read from a file."""
    if place == "disk" and config is not None:
        raise InputError(
            'loading: [model] offload = "disk" is given with config, whose weights are drawn and '
            'lie in no file, expected path; or take offload = "host"'
        )


def require_frozen(whole: Set[str], names: Set[str], who: str) -> None:
    """InputError for weights that are to train whole and are kept off the device. who: what trains
    them.
    """
    both = sorted(whole & names)
    if both:
        raise InputError(
            f"stages: {who} is to train {both[0]}, which [model] offload keeps off the device, "
            "expected a frozen weight; train it by a lora stage, or drop offload"
        )


def refuse_plan(plan: object) -> None:
    """InputError for weights that are offloaded and cut by a plan of several ranks."""
    if plan != "dp":
        raise InputError(
            f"loading: offload is given with plan = {plan!r}, which leaves to each rank a part of "
            'every weight, expected plan = "dp"; drop one of them'
        )
