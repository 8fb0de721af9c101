"""Greedy answers of other programs, judged by the model that they should come from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minitune.models.model import Model


def largest_gap(model: Model, params: Mapping[str, Any], prompt: Sequence[int], answer: Sequence[int]) -> float:
    """How far below the largest logit the token of an answer ever is, after all those before it; 0 for a greedy answer.

    As a share of the standard deviation of a position's logits: two tokens that are nearly as likely may change places.
    """
    with torch.no_grad():
        logits = model.forward(params, torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())
