"""PEFT's view of a model with experts: it adapts parameters (LoraConfig.target_parameters), where other weights are modules.

transformers 5 keeps the experts of a layer in two tensors, whatever the files hold, so that PEFT has one A and one B for all of
them; and its routers are no linear modules. Letters beside those of types: X experts; I, O the dims of an expert's map.
"""

import re
from collections.abc import Collection, Sequence

from jaxtyping import Float
from torch import Tensor

from minitune.errors import InputError
from minitune.types import Delta

UP, DOWN = "gate_up_proj", "down_proj"  # how transformers calls the two tensors; PEFT wraps the second around the first
STACKED = (UP, DOWN)
PARTS = {"w1": UP, "w3": UP, "gate_proj": UP, "up_proj": UP, "w2": DOWN, "down_proj": DOWN}
SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
INPUTS_FIRST = ".mlp.experts."  # gpt-oss, whose class says is_transposed; Llama 4 has the same layout and does not say so


def parameters(names: Collection[str]) -> dict[str, str]:
    """PEFT's name of the parameter that holds each feed-forward weight of a model with experts; empty for other models."""
    if not any(".experts." in name for name in names):
        return {}
    paths = {name: name.replace(".block_sparse_moe.", ".mlp.") for name in names}
    for name, path in paths.items():
        if single := SINGLE.fullmatch(path):
            paths[name] = f"{single[1]}.{PARTS[single[3]]}"
    return {name: path for name, path in paths.items() if re.search(r"\.(mlp|feed_forward)\.", path)}


def places(names: Collection[str]) -> dict[str, list[str]]:
    """Weights that each of PEFT's parameters holds, by the parameter's name."""
    names_of: dict[str, list[str]] = {}
    for name, path in parameters(names).items():
        names_of.setdefault(path, []).append(name)
    return names_of


def is_single(name: str) -> bool:
    """True for a weight of one expert."""
    return SINGLE.fullmatch(name) is not None


def n_joined(name: str, path: str) -> int:
    """Number of weights of one expert that share its part of a parameter: 2 for gate and up, where the files have them apart."""
    return 2 if path.endswith(UP) and path != name else 1


def inner(path: str, adapted: Collection[str]) -> bool:
    """True where PEFT puts another wrapper around that of a stacked weight, and `base_layer` into its keys."""
    return path.endswith(UP) and f"{path.removesuffix(UP)}{DOWN}" in adapted


def flattened(path: str, delta: Delta) -> Delta:
    """PEFT's A [X*R I] and B [O R*X] of a stacked delta."""
    a, b = (delta.b.mT, delta.a.mT) if INPUTS_FIRST in path else (delta.a, delta.b)
    return Delta(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def unflattened(
    path: str, a: Float[Tensor, "XR I"], b: Float[Tensor, "O RX"], rank: int, names: Sequence[str]
) -> dict[str, Delta]:
    """Deltas, by name, of what a parameter's A and B adapt: one stacked weight, or the single experts' weights `names`.

    Where gate and up are one tensor for PEFT, both get a copy of its A and their own rows of B. InputError for another number of
    experts.
    """
    n = len(a) // rank
    each_a = a.unflatten(0, (n, rank))
    each_b = b.unflatten(1, (rank, n)).permute(2, 0, 1)
    if path in names:
        pair = (each_b.mT, each_a.mT) if INPUTS_FIRST in path else (each_a, each_b)
        return {path: Delta(*(x.contiguous() for x in pair))}
    ordered = sorted(names, key=_place)
    n_parts = n_joined(ordered[0], path)
    if len(ordered) != n * n_parts:
        raise InputError(
            f"peft: {path} has deltas of {n} experts, expected {len(ordered) // n_parts} as in the model; is it of another base?"
        )
    pairs = [(one, rows) for one, all_rows in zip(each_a, each_b, strict=True) for rows in all_rows.chunk(n_parts)]
    return {name: Delta(one.clone(), rows.contiguous()) for name, (one, rows) in zip(ordered, pairs, strict=True)}


def _place(name: str) -> tuple[int, str]:
    """Order of the rows: by expert, and in each gate (or w1) before up (or w3)."""
    single = SINGLE.fullmatch(name)
    return (int(single[2]), single[3]) if single else (0, name)
