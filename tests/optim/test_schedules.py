"""Schedules against those of transformers."""

from typing import Any

import pytest
import torch

from minitune.optim.schedules import Cosine, InverseSqrt, Linear, Schedule, Wsd

STEPS = 37


def theirs(name: str, **numbers: Any) -> list[float]:
    """Factors of steps 0, 1, ... of transformers, after the warm-up."""
    import transformers

    rule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(transformers, name)(rule, **numbers)
    factors = []
    for _ in range(STEPS):
        factors.append(schedule.get_last_lr()[0])
        rule.step()
        schedule.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_schedule_falls_as_transformers_does(warmup: int) -> None:
    name, both = "get_inverse_sqrt_schedule", {"num_warmup_steps": warmup}
    whole = {**both, "num_training_steps": STEPS}
    line = {"num_stable_steps": (STEPS - warmup) // 2, "num_decay_steps": (STEPS - warmup) // 2, "decay_type": "linear"}
    pairs: list[tuple[Schedule, list[float]]] = [
        (Linear(warmup), theirs("get_linear_schedule_with_warmup", **whole)),
        (Cosine(warmup), theirs("get_cosine_schedule_with_warmup", **whole)),
        (InverseSqrt(warmup, 11), theirs(name, **both, timescale=11)),
    ]
    if warmup == 5:  # then half of what follows is a whole number of steps
        pairs.append((InverseSqrt(warmup), theirs(name, **both)))
        pairs.append((Wsd(warmup, decay_share=0.5), theirs("get_wsd_schedule", **both, **line)))
    for schedule, wanted in pairs:
        found = [float(schedule.factor(torch.tensor(t), STEPS)) for t in range(STEPS)]
        assert found[warmup:] == pytest.approx(wanted[warmup:], abs=1e-9), type(schedule).__name__
