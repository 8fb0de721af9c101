"""Position of an adapted module in the model: of which weight it is, and how PEFT calls it.

PEFT adapts modules, and parameters that hold the weights of many experts.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from minitune.interop.peft import experts
from minitune.interop.peft.config import AdapterConfig
from minitune.models.fused_experts import is_single, parameter_by_weight, weights_by_parameter
from minitune.models.hf_multimodal import text_name


class ModulePlace(NamedTuple):
    """Position of an adapted module in the model.

    weight: the name of its weight, without a parameter; parameter: the stacked experts that PEFT
    adapts as one parameter, or ""; path: its name in PEFT's patterns of ranks and alphas.
    """

    weight: str
    parameter: str
    path: str


class WeightNames(NamedTuple):
    """Names of a model's weights; parameters: PEFT's name of each weight of an expert; joined: the
    weights of each of those.
    """

    weights: frozenset[str]
    parameters: Mapping[str, str]
    joined: Mapping[str, list[str]]


def weight_names(names: Collection[str]) -> WeightNames:
    """Names of a model's weights as a module is looked up in them."""
    return WeightNames(frozenset(names), parameter_by_weight(names), weights_by_parameter(names))


def place_of(config: AdapterConfig, module: str, names: WeightNames) -> ModulePlace:
    """Position of a module, by its name in the adapter's keys."""
    inside = (text_name(f"{module}.") or f"{module}.").removesuffix(".")
    outer = inside.removesuffix(".base_layer")
    raw = module.removesuffix(".base_layer")
    weight = f"{inside}.weight"
    if weight not in names.weights:
        weight = next(iter(names.joined.get(weight, [])), weight)

    # PEFT wraps the second parameter of a module around the first, whose keys then lie under
    # `base_layer`.
    stacked = [
        one
        for one in experts.STACKED
        if f"{outer}.{one}" in names.joined and config.is_target(f"{raw}.{one}")
    ]
    if inside == outer and stacked:
        return ModulePlace(weight, f"{outer}.{stacked[-1]}", f"{raw}.{stacked[-1]}")
    if inside != outer and len(stacked) == 2:
        return ModulePlace(weight, f"{outer}.{stacked[0]}", f"{raw}.{stacked[0]}")

    # A router is a parameter to PEFT though its delta is that of one weight.
    candidates = [f"{module}.weight"]
    if not is_single(weight):
        candidates.append(names.parameters.get(weight, ""))
    path = next((path for path in candidates if config.is_target(path)), module)
    return ModulePlace(weight, "", path)
