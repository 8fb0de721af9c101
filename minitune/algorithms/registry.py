"""Objectives by the name that a loss declares."""

from collections.abc import Callable
from typing import Any, NamedTuple

from minitune.algorithms.distillation import Teacher, distillation
from minitune.algorithms.objective import Objective
from minitune.algorithms.preference import preference
from minitune.algorithms.supervised import sft
from minitune.algorithms.unpaired import unpaired_preference
from minitune.lora import Lora
from minitune.losses.base import BaseLoss, ObjectiveName
from minitune.models.model import Model
from minitune.types import Trainable


class Frozen(NamedTuple):
    """Models that an objective compares the policy with; a loss says which of these it needs."""

    # the trainable tree as it was when training began; {}: the parameters alone
    reference: Trainable | None = None
    teacher: Teacher | None = None


OBJECTIVES: dict[ObjectiveName, Callable[[Model, Lora | None, Any, Frozen], Objective]] = {
    "supervised": lambda model, lora, loss, frozen: sft(model, lora, loss),
    "preference": lambda model, lora, loss, frozen: preference(model, lora, loss, frozen.reference),
    "unpaired_preference": lambda model, lora, loss, frozen: unpaired_preference(
        model, lora, loss, frozen.reference
    ),
    "distillation": lambda model, lora, loss, frozen: distillation(
        model, lora, loss, frozen.teacher
    ),
}


def objective_of(model: Model, lora: Lora | None, loss: BaseLoss, frozen: Frozen) -> Objective:
    """Objective that a loss declares, with what it compares the model with."""
    return OBJECTIVES[loss.objective](model, lora, loss, frozen)
