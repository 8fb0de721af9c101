"""Floating-point operations of a training step, for each of its tokens."""

import re

import torch
from torch import Tensor

from minitune.models.config import layer_kind
from minitune.models.mixers.registry import MIXERS
from minitune.models.model import Model
from minitune.models.weights import head_name
from minitune.types import Delta, Trainable

STEPS = (  # of a block, in the order of its forward; the weights of one step see the same input
    r"input_layernorm",
    r"self_attn\.(q|k|v|qkv)_proj",
    r"self_attn\.([qk]_norm|sinks)",
    r"self_attn\.o_proj",
    r"(post_attention|pre_feedforward)_layernorm",
    r"(?!.*(down_proj|\.w2\b|post_feedforward))",
    r"(?!.*post_feedforward)",
    r"",
)
ATTENTION = 2  # the step behind which queries, keys and values are there


def flops_per_token(model: Model, trainable: Trainable, companions: float | int) -> float:
    """Floating-point operations of a training step for each of its tokens, all of them targets and
    in a document with `companions` tokens on average (the sum of squares of the documents' lengths
    over the sum of their lengths).

    2 for every weight that a token is multiplied by, 2 more where its input has a gradient, 2 more
    where it trains whole; those of deltas; attention over the keys that are seen, forward and twice
    as many back; the forward of blocks that are recomputed.
    """
    config, experts = model.config, model.config.experts
    first = min((_place(name) for name in trainable), default=(torch.inf, 0))
    total = 0.0
    head = head_name(config)
    for name, shape in model.shapes().items():
        if len(shape) < 2 or (name.endswith("embed_tokens.weight") and name != head):
            continue
        place = (torch.inf, 1) if name == head else _place(name)
        share = (
            experts.n_active / experts.n_experts
            if experts is not None and ".experts." in name
            else 1.0
        )
        leaf, back = trainable.get(name), first < place
        forward = n = 2 * share * torch.Size(shape).numel()
        total += n * (1 + back + isinstance(leaf, Tensor))
        if isinstance(leaf, Delta):
            n_a, n_b = (2 * share * x.numel() for x in (leaf.a, leaf.b))
            forward = n + n_a + n_b
            total += n_a * (2 + back) + 3 * n_b
        total += forward if place[0] < model.n_remat and first <= (place[0], len(STEPS)) else 0
    for i in range(config.n_layers):
        kind = layer_kind(config, i)
        forward = MIXERS[kind.mixer].flops(config, kind, companions)
        back = first <= (i, ATTENTION)
        total += forward * (3 if back else 1) + (
            forward if i < model.n_remat and first <= (i, len(STEPS)) else 0
        )
    return total


def _place(name: str) -> tuple[float | int, int]:
    """(layer, step) of a weight in the forward."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None:
        return (
            (-1, 0)
            if name.endswith("embed_tokens.weight")
            else (torch.inf, int(not name.startswith("model.norm")))
        )
    within_layer = name[layer.end() :]
    return int(layer[1]), next(i for i, step in enumerate(STEPS) if re.match(step, within_layer))
