"""PEFT's view of a model with experts: it adapts parameters (LoraConfig.target_parameters), where
other weights are modules.

transformers 5 keeps the experts of a layer in two tensors, whatever the files hold, so that PEFT
has one A and one B for all of them; and its routers are no linear modules. Letters beside those of
types: X experts; I, O the dims of an expert's map.
"""

from collections.abc import Collection, Sequence

from jaxtyping import Float
from torch import Tensor

from minitune.errors import InputError
from minitune.models.fused_experts import DOWN, UP, n_joined
from minitune.types import Delta

STACKED = (UP, DOWN)  # PEFT wraps the second around the first
# gpt-oss, whose class says is_transposed; Llama 4 has the same layout and does not say so
INPUTS_FIRST = ".mlp.experts."


def inner(path: str, adapted: Collection[str]) -> bool:
    """True where PEFT puts another wrapper around that of a stacked weight, and `base_layer` into
    its keys.
    """
    return path.endswith(UP) and f"{path.removesuffix(UP)}{DOWN}" in adapted


def flattened(path: str, delta: Delta) -> Delta:
    """PEFT's A [X*R I] and B [O R*X] of a stacked delta."""
    a, b = (delta.b.mT, delta.a.mT) if INPUTS_FIRST in path else (delta.a, delta.b)
    return Delta(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def unflattened(
    path: str, a: Float[Tensor, "XR I"], b: Float[Tensor, "O RX"], rank: int, names: Sequence[str]
) -> dict[str, Delta]:
    """Deltas, by name, of what a parameter's A and B adapt: one stacked weight, or the single
    experts' weights `names`.

    Where gate and up are one tensor for PEFT, both get a copy of its A and their own rows of B.
    InputError for another number of experts.
    """
    n = len(a) // rank
    each_a = a.unflatten(0, (n, rank))
    each_b = b.unflatten(1, (rank, n)).permute(2, 0, 1)
    if path in names:
        pair = (each_b.mT, each_a.mT) if INPUTS_FIRST in path else (each_a, each_b)
        return {path: Delta(*(x.contiguous() for x in pair))}
    n_parts = n_joined(names[0], path)
    if len(names) != n * n_parts:
        raise InputError(
            f"peft: {path} has deltas of {n} experts, expected {len(names) // n_parts} as in the "
            "model; is it of another base?"
        )
    pairs = [
        (one, rows)
        for one, all_rows in zip(each_a, each_b, strict=True)
        for rows in all_rows.chunk(n_parts)
    ]
    return {
        name: Delta(one.clone(), rows.contiguous())
        for name, (one, rows) in zip(names, pairs, strict=True)
    }
