"""How near two results are, and assertions about it."""

import torch

from minitune import tree


def distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest wanted value."""
    return float((actual - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-9))


def assert_trees_close(actual: tree.Tree, wanted: tree.Tree, tolerance: float) -> None:
    """Every leaf within tolerance of the largest value of the wanted tree."""
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(wanted)) or 1.0
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * scale), actual, wanted)
