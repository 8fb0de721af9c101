"""Training of weights that are rounded to their quantized values in the forward."""

from collections.abc import Callable

from minitune.algorithms.objective import Objective
from minitune.types import Trainable


def quantization_aware(objective: Objective, fake: Callable[[Trainable], Trainable]) -> Objective:
    """Objective at the weights as they will be once quantized; `fake` rounds them and passes
    gradients straight through.
    """
    return lambda trainable, params, batch: objective(fake(trainable), params, batch)
