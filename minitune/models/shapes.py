"""Shapes of weights by name, and what their dims mean."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

Shapes = dict[str, tuple[int, ...]]
# glob of names -> meaning of each dim, in storage order; the first glob that matches counts, and
# none matches everything
Dims = Mapping[str, tuple[str, ...]]


def linear_shapes(name: str, out: int, in_: int, bias: bool) -> Shapes:
    """Shapes of a linear map's weight and, if it has one, its bias."""
    weight: Shapes = {f"{name}.weight": (out, in_)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


def linear_dims(name: str, out: str, in_: str) -> Dims:
    """Dims of a linear map's weight and bias."""
    return {f"{name}.weight": (out, in_), f"{name}.bias": (out,)}


def named_dims(names: Iterable[str], dims: Dims) -> dict[str, tuple[str, ...]]:
    """Dims of each weight by its name; TypeError for a weight that no glob matches."""

    def of(name: str) -> tuple[str, ...]:
        matches = (found for glob, found in dims.items() if fnmatchcase(name, glob))
        found = next(matches, None)
        if found is None:
            raise TypeError(
                f"models: no dims of {name} are declared, expected a line for it in the table of "
                "dims beside its shape"
            )
        return found

    return {name: of(name) for name in names}
