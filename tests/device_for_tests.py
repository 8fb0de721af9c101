"""A device that has no memory: torch's meta device under a mode that refuses what would make the host wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune import hardware, tree
from minitune.tree import Tree

META = torch.device("meta")
WAITS = ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "masked_select", "_unique2", "repeat_interleave.Tensor")
COPIES = ("_to_copy", "copy_", "copy")
WITH_FLOAT64 = hardware.Capabilities(float64=True, streams=True, compiles=False)
WITHOUT_FLOAT64 = WITH_FLOAT64._replace(float64=False)


class Waited(AssertionError):
    """An operator that waits for the device, mixes two devices, or asks the device for a dtype that it lacks."""


class _Operators(TorchDispatchMode):
    """Runs operators on the host as they are, and those of the device without values; raises Waited for what a device refuses."""

    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64, self.reads = float64, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or (given[0].device if given else "cpu"))
        name, there = str(func).removeprefix("aten."), [x for x in given if isinstance(x, FakeTensor)]
        if not there and target.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if there and any(name.startswith(word) for word in WAITS):
            raise Waited(f"{name} waits for the device")
        if name.split(".")[0] in COPIES:
            self._check_copy(name, there, given, target, args, kwargs)
        elif any(x.device.type == "cpu" and x.ndim > 0 for x in given):
            raise Waited(f"{name} has tensors of the host and of the device")
        made = func(*args, **kwargs)
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.device.type != "cpu" and x.dtype == torch.float64 and not self.float64:
                raise Waited(f"{name} makes float64 on a device that lacks it")
        return made

    def _check_copy(self, name: str, there: Any, given: Any, target: torch.device, args: Any, kwargs: Any) -> None:
        into_device = target.type != "cpu"
        from_host = any(x.device.type == "cpu" and x.ndim > 0 for x in given)
        if there and not into_device and not self.reads:
            raise Waited(f"{name} copies from the device to the host")
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if into_device and from_host and waits:
            raise Waited(f"{name} copies to the device and waits")


class _Constructors(TorchFunctionMode):
    """Refuses torch.tensor and its kin where they are asked for values on the device: these are copied, and waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = torch.device(kwargs.get("device") or "cpu").type != "cpu"
        of_device = func is Tensor.new_tensor and args[0].device.type != "cpu"
        if of_device or (func in (torch.tensor, torch.as_tensor) and on_device):
            raise Waited(f"{func.__name__} copies values to the device and waits")
        return func(*args, **kwargs)


@contextmanager
def simulated(capabilities: hardware.Capabilities = WITH_FLOAT64) -> Iterator[_Operators]:
    """A device of these capabilities under the name "meta": tensors there have no values, and nothing may wait for it."""
    table = {**hardware.CAPABILITIES, "meta": capabilities}
    operators = _Operators(capabilities.float64)
    with (
        mock.patch.object(hardware, "CAPABILITIES", table),
        mock.patch.object(hardware, "_pinned", lambda x: x),
        mock.patch.object(FakeTensor, "is_meta", False, create=True),  # what tells a model that a weight has no values
        FakeTensorMode(allow_non_fake_inputs=True),
        operators,
        _Constructors(),
    ):
        yield operators


def on_device(leaves: Tree) -> Tree:
    """The tree as it would be on the simulated device."""
    return tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=META), leaves)
