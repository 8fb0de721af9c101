"""A device that has no memory: torch's meta device under a mode that refuses what would make the host wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
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


class WaitError(AssertionError):
    """An operator that waits for the device, mixes two devices, or asks the device for a dtype that it lacks."""


class _Operators(TorchDispatchMode):
    """Runs operators of the host as they are and those of the device without values; WaitError for what a device refuses."""

    def __init__(self, float64: bool, waits: bool) -> None:
        super().__init__()
        self.float64, self.waits = float64, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or (given[0].device if given else "cpu"))
        name, there = str(func).removeprefix("aten."), [x for x in given if isinstance(x, FakeTensor)]
        if not there and target.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if there and not self.waits and any(name.startswith(word) for word in WAITS):
            raise WaitError(f"{name} waits for the device")
        if name.split(".")[0] in COPIES:
            self._check_copy(name, there, given, target, args, kwargs)
        elif any(x.device.type == "cpu" and x.ndim > 0 for x in given):
            raise WaitError(f"{name} has tensors of the host and of the device")
        try:
            made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:  # a shape or a number that values decide
            raise WaitError(f"{name} waits for the device") from error
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.device.type != "cpu" and x.dtype == torch.float64 and not self.float64:
                raise WaitError(f"{name} makes float64 on a device that lacks it")
        return made

    def _check_copy(self, name: str, there: Any, given: Any, target: torch.device, args: Any, kwargs: Any) -> None:
        into_device = target.type != "cpu"
        from_host = any(x.device.type == "cpu" and x.ndim > 0 for x in given)
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if self.waits:
            return
        if there and not into_device and blocking:
            raise WaitError(f"{name} copies from the device to the host and waits")
        if into_device and from_host and blocking:
            raise WaitError(f"{name} copies to the device and waits")


class _Constructors(TorchFunctionMode):
    """Refuses torch.tensor and its kin where they are asked for values on the device: these are copied, and waited for."""

    def __init__(self, waits: bool) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = torch.device(kwargs.get("device") or "cpu").type != "cpu"
        of_device = func is Tensor.new_tensor and args[0].device.type != "cpu"
        if not self.waits and (of_device or (on_device and func in (torch.tensor, torch.as_tensor))):
            raise WaitError(f"{func.__name__} copies values to the device and waits")
        return func(*args, **kwargs)


@contextmanager
def simulated(capabilities: hardware.Capabilities = WITH_FLOAT64, *, waits: bool = False) -> Iterator[None]:
    """A device of these capabilities under the name "meta": tensors there have no values.

    Nothing may lie on the wrong device and, unless `waits`, nothing may wait for it.
    """
    table = {**hardware.CAPABILITIES, "meta": capabilities}
    with (
        mock.patch.object(hardware, "CAPABILITIES", table),
        mock.patch.object(hardware, "pinned", lambda x: x),
        mock.patch.object(hardware, "_module", return_value=mock.MagicMock()),  # its streams and events
        mock.patch.object(FakeTensor, "is_meta", False, create=True),  # which tells a model that a weight has no values
        FakeTensorMode(allow_non_fake_inputs=True),
        _Operators(capabilities.float64, waits),
        _Constructors(waits),
    ):
        yield


def on_device(leaves: Tree) -> Tree:
    """The tree as it would be on the simulated device."""
    return tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=META), leaves)
