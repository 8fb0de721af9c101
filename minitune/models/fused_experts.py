"""Experts of a layer as transformers 5 keeps them in memory: two tensors, whatever files hold.

PEFT adapts these, and `save_pretrained(save_original_format=False)` writes them. Letters beside
those of types: X experts; I, O the dims of an expert's map.
"""

import re
from collections.abc import Collection, Sequence

from jaxtyping import Float
from torch import Tensor

UP, DOWN = "gate_up_proj", "down_proj"  # how transformers calls the two tensors
PARTS = {"w1": UP, "w3": UP, "gate_proj": UP, "up_proj": UP, "w2": DOWN, "down_proj": DOWN}
SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def parameter_by_weight(names: Collection[str]) -> dict[str, str]:
    """Parameter that holds each feed-forward weight of a model with experts; empty for others."""
    if not any(".experts." in name for name in names):
        return {}
    paths = {name: name.replace(".block_sparse_moe.", ".mlp.") for name in names}
    for name, path in paths.items():
        if single := SINGLE.fullmatch(path):
            paths[name] = f"{single[1]}.{PARTS[single[3]]}"
    return {n: path for n, path in paths.items() if re.search(r"\.(mlp|feed_forward)\.", path)}


def weights_by_parameter(names: Collection[str]) -> dict[str, list[str]]:
    """Weights that each parameter holds, in the order of its rows, by the parameter's name."""
    names_of: dict[str, list[str]] = {}
    for name, path in parameter_by_weight(names).items():
        names_of.setdefault(path, []).append(name)
    return {path: sorted(names, key=_place) for path, names in names_of.items()}


def is_single(name: str) -> bool:
    """True for a weight of one expert."""
    return SINGLE.fullmatch(name) is not None


def n_joined(name: str, path: str) -> int:
    """Number of weights of one expert that share its part of a parameter.

    It is 2 for gate and up, where the files have them apart.
    """
    return 2 if path.endswith(UP) and path != name else 1


def fused_shape(path: str, names: Sequence[str], one: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter that holds these weights, each of shape `one`."""
    if not is_single(names[0]):
        return one
    n_parts = n_joined(names[0], path)
    return (len(names) // n_parts, n_parts * one[0], one[1])


def unfused(path: str, w: Float[Tensor, "..."], names: Sequence[str]) -> dict[str, Tensor]:
    """Weights of single experts as views of the parameter that holds them, by name."""
    if not is_single(names[0]):
        return {names[0]: w}
    n_parts = n_joined(names[0], path)
    rows = [part for expert in w for part in expert.chunk(n_parts)]
    return dict(zip(names, rows, strict=True))


def _place(name: str) -> tuple[int, str]:
    """Order of the rows: by expert, and in each gate (or w1) before up (or w3)."""
    single = SINGLE.fullmatch(name)
    return (int(single[2]), single[3]) if single else (0, name)
