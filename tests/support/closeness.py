"""How near two results are, and assertions about it."""

from collections.abc import Mapping

import torch

from minitune import tree


def distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest wanted value."""
    return float((actual - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-9))


def assert_trees_close(actual: tree.Tree, wanted: tree.Tree, tolerance: float) -> None:
    """Every leaf within tolerance of the largest value of the wanted tree."""
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(wanted)) or 1.0
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * scale), actual, wanted)


def distances(actual: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """|actual - wanted| of each leaf, as a share of |wanted|; infinite where a leaf that is zero is not."""
    assert actual.keys() == wanted.keys()

    def share(x: torch.Tensor, y: torch.Tensor) -> float:
        assert x.shape == y.shape
        far, size = (float(torch.linalg.vector_norm(z.double())) for z in (x.double() - y.double(), y))
        if not far:
            return 0.0
        return far / size if size else float("inf")

    return {name: share(x, wanted[name]) for name, x in actual.items()}


def root_mean_square(shares: Mapping[str, float]) -> float:
    """One number of the distances of leaves: it varies less with the order of sums than the largest of them."""
    return (sum(share**2 for share in shares.values()) / len(shares)) ** 0.5
