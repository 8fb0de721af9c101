"""Base of every stage, and functions that several of them need."""

from typing import ClassVar

import msgspec
import torch

from minitune import hardware, host
from minitune.algorithms.objective import apply_trainable
from minitune.algorithms.quantization_aware import fake_quantized
from minitune.programs.state import AbstractState, PipelineState
from minitune.types import Params


class BaseStage(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="op"
):
    """One table [[stage]] of a program."""

    observes: ClassVar[bool] = False  # True: it leaves the model as it is
    # True: it observes weights that all ranks of a plan put together, in a forward for one
    gathers: ClassVar[bool] = False
    shards: ClassVar[bool] = False  # True: it works on weights of which each rank holds a part
    # keys that decide how the stage's work is done, and not what comes out of it, rounding aside
    free_keys: ClassVar[tuple[str, ...]] = ()

    name: str | None = None  # what overrides and summary.json call it; the op if absent

    @property
    def label(self) -> str:
        """Name in overrides, records and messages."""
        return self.name or str(self.__struct_config__.tag)

    def check(self, abstract: AbstractState) -> AbstractState:
        """Abstract state after this stage; InputError for what would stop it later. Nothing is
        loaded and nothing runs.
        """
        raise NotImplementedError

    def run(self, state: PipelineState) -> PipelineState:
        """State after this stage."""
        raise NotImplementedError


def peak_mem_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device's tensors if it is an accelerator, else of the process."""
    if hardware.is_accelerator(device):
        return hardware.peak_bytes(device)
    return host.peak_bytes()


def adapted_params(state: PipelineState) -> Params:
    """Parameters for a forward, with weights rounded as in quantization-aware training."""
    loaded = state.loaded
    trainable = loaded.trainable
    if state.fake is not None:
        trainable = fake_quantized(state.fake, trainable)
    return apply_trainable(loaded.params, trainable, loaded.lora)
