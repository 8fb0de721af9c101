"""Facts about later stages by which earlier ones go: memory, and weights that become codes."""

from collections.abc import Mapping, Sequence
from typing import Any

from minitune.algorithms.gptq import Rtn
from minitune.data.source import Source
from minitune.programs.stages.adapt import Load
from minitune.programs.stages.quantize import Quantize
from minitune.programs.stages.train import Train
from minitune.quant.rules import Quantization


def tokens_at_once(stages: Sequence[Any], data: Mapping[str, Source]) -> int | None:
    """Fewest tokens that go through the model together in a training step; None without one.

    Evaluations and generations take as many by default, so that they fit where the steps fit.
    """
    training = [stage for stage in stages if isinstance(stage, Train)]
    return min((stage.n_rows * data[stage.data].max_seq_len for stage in training), default=None)


def first_rules(stages: Sequence[Any]) -> dict[str, Quantization]:
    """Rules of quantization that follow the loading of a model at once, by the stage that loads.

    "" is the program's own model. Weights that they match go from the disk to codes one by one, and
    are never all on the device as they are stored. Calibration needs them there.
    """
    rules = {}
    loaders = ["", *(stage.label if isinstance(stage, Load) else None for stage in stages)]
    for loader, following in zip(loaders, stages, strict=False):
        if loader is None or not isinstance(following, Quantize):
            continue
        if isinstance(following.method, Rtn):
            rules[loader] = following.rule
    return rules
