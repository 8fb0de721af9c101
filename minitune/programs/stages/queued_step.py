"""Steps that are queued on a device, whose metrics are read later."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch

from minitune import hardware
from minitune.programs.stages.loop_state import MetricValues
from minitune.types import Metrics


class QueuedStep(NamedTuple):
    """Step that is queued on the device, and the function that waits for its metrics."""

    step: int
    epoch: int  # that its first row is of, from 0 on
    n_tokens: int
    read: Callable[[], MetricValues]


def reading(metrics: Metrics) -> Callable[[], MetricValues]:
    """Begin to copy a step's metrics to the host, all at once; the function that is returned waits
    for them.
    """
    names, values = list(metrics), metrics.values()
    wide = reduce(torch.promote_types, (x.dtype for x in values), torch.float32)
    read = hardware.reading(torch.stack([x.reshape(-1).to(wide) for x in values]))
    return lambda: dict(zip(names, read().tolist(), strict=True))


def n_ahead(device: torch.device) -> int:
    """Number of steps that are queued before the metrics of one are read.

    An accelerator gets its next step before the last one is read, so that it never waits.
    """
    return 1 if hardware.is_accelerator(device) else 0
