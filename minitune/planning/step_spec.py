"""Step of a training, as its costs are counted."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from minitune.algorithms.distillation import Teacher
from minitune.lora import Lora
from minitune.models.model import Model
from minitune.optim.transforms import GradientTransformation
from minitune.planning.mesh import ALONE, Mesh
from minitune.types import Params, Trainable

BlockPlace = Literal["device", "host", "disk"]  # where frozen blocks lie
Parts = Mapping[str, int]  # what is in memory -> its bytes
# id, segment and mask of a token as they come, the same moved to the place that predicts them, the
# places of targets
BATCH_BYTES_PER_TOKEN = 45


class StepSpec(NamedTuple):
    """Everything that a training step works on.

    Of tensors only shapes and dtypes are read, so they may be on the meta device.
    """

    model: Model
    # those of weights that train whole say what dtype is computed with, and are not there
    params: Params
    trainable: Trainable
    lora: Lora | None
    optimizer: GradientTransformation
    loss: Any
    device: torch.device
    n_rows: int  # that go through the model together in a micro-batch: both answers of a pair
    n_tokens: int  # of a row
    n_micro_batches: int = 1
    # weights that train whole and are rounded to their quantized values in the forward
    rounded: Collection[str] = ()
    reference: Trainable = MappingProxyType(
        {}
    )  # the trainable tree that the policy is compared with
    teacher: Teacher | None = None
    # inputs of blocks that are computed again wait in the host's memory (autodiff/offload.py)
    offloaded: bool = False
    # of the ranks; all that trains and all weights are divided as it says, and n_rows are those
    # that a rank works on, alone or with others
    mesh: Mesh = ALONE
    # of the model and of the teacher; what trains lies on the device
    blocks: BlockPlace = "device"
    teacher_blocks: BlockPlace = "device"
