"""Base of all losses: their types, what each kind declares, and a logarithm that stays
finite.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.structs import CheckedStruct

Nats = Float[Tensor, "*rows"]  # log-probabilities or losses
Logits = Float[Tensor, "*rows V"]
ObjectiveName = Literal["supervised", "preference", "unpaired_preference", "distillation"]


class BaseLoss(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Declarations of every kind of loss, so that whoever trains with it need not know which one it
    is.
    """

    objective: ClassVar[ObjectiveName]  # the algorithm that makes it a number to differentiate
    formats: ClassVar[tuple[str, ...]]  # of the data that it learns from
    # its inputs are log-probs of whole answers, and not logits
    compares_answers: ClassVar[bool] = False
    # it compares the policy with a frozen copy of where training began
    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False  # it compares the student with another model
    rows_per_sample: ClassVar[int] = 1  # that go through the model together: both answers of a pair
    min_samples: ClassVar[int] = 1  # of a micro-batch


def log1mexp(x: Nats) -> Nats:
    """log(1 - exp(x)) for log-probabilities x <= 0 (Maechler 2012, eq. 7); a probability within
    rounding of 1 or above counts as 1 - eps, so that the value is at least log(eps) and the
    gradient finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
