"""Shapes of weights by name."""

Shapes = dict[str, tuple[int, ...]]


def linear_shapes(name: str, out: int, in_: int, bias: bool) -> Shapes:
    """Shapes of a linear map's weight and, if it has one, its bias."""
    weight: Shapes = {f"{name}.weight": (out, in_)}
    return weight | {f"{name}.bias": (out,)} if bias else weight
