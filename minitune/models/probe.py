"""Probe: outputs of linear maps within the blocks, for whoever needs them beside the result."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.models.block import BlockFunction
from minitune.models.config import DecoderConfig, MixerName
from minitune.types import Params


class Probe(NamedTuple):
    """Outputs of linear maps of the blocks, through which gradients flow: also of blocks that are
    compiled or recomputed.
    """

    # their names within a layer, such as "self_attn.o_proj.weight"; a layer without one is passed
    # by
    weights: tuple[str, ...]
    # called with the weight's whole name and its map's output [B T out], once a forward
    receive: Callable[[str, Tensor], None]


def probed_block(
    block: BlockFunction,
    config: DecoderConfig,
    mixer: MixerName,
    weights: tuple[str, ...],
    w: Params,
    x: Float[Tensor, "B T D"],
    *rest: Any,
) -> Float[Tensor, "B T D_and_outputs"]:
    """Result of a block, followed by the outputs of the linear maps of `weights`, in one tensor, as
    remat wants it.
    """
    outputs: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor, y: Tensor) -> None:
        if name in weights:
            outputs[name] = y

    result = block(config, mixer, w, x, *rest, tap=tap)
    return torch.cat([result, *(outputs[name] for name in weights if name in w)], dim=-1)


def report(
    run: Callable[..., Tensor], probe: Probe, i: int, w: Params, x: Tensor, *rest: Any
) -> Tensor:
    """Result of a probed block, whose outputs the probe has received."""
    names = [name for name in probe.weights if name in w]
    sizes = [x.shape[-1], *(w[name].shape[0] for name in names)]
    result, *outputs = run(w, x, *rest).split(sizes, dim=-1)
    for name, y in zip(names, outputs, strict=True):
        probe.receive(f"model.layers.{i}.{name}", y)
    return result
