"""Layers that are alike: one of each kind is measured, and stands for the others."""

from collections.abc import Mapping
from typing import Any

from minitune import tree
from minitune.models.config import layer_kind
from minitune.models.model import Model
from minitune.types import Params, Trainable


def first_alike(model: Model, params: Params, trainable: Trainable) -> list[int]:
    """For each layer the first one that is alike: of the same kind, with leaves of the same names,
    shapes and dtypes."""
    of_layer: dict[int, list[Any]] = {i: [] for i in range(model.config.n_layers)}
    for role, leaves in enumerate((params, trainable)):
        for name, leaf in leaves.items():
            layer = layer_number(name)
            if layer is not None:
                shapes = tuple((path, x.shape, x.dtype) for path, x in tree.items(leaf))
                of_layer[layer].append((role, name.split(".", 3)[3], type(leaf), shapes))
    first: dict[Any, int] = {}
    found = []
    for i, leaves in of_layer.items():
        key = (layer_kind(model.config, i), tuple(sorted(leaves, key=lambda one: one[:2])))
        found.append(first.setdefault(key, i))
    return found


def representatives(leaves: Mapping[str, Any], alike: list[int]) -> dict[str, Any]:
    """Leaves without those of layers for which another one stands."""
    kept = set(alike)
    return {name: leaf for name, leaf in leaves.items() if layer_number(name) in {None, *kept}}


def layer_number(name: str) -> int | None:
    """Layer of a weight, None for those outside of the layers."""
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) == 4 else None
