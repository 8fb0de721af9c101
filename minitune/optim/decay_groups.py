"""Weight decay by globs: norms, biases or embeddings without it, as in torch's parameter groups."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from torch import Tensor

from minitune import tree
from minitune.optim.partition import Partition
from minitune.optim.transforms import GradientTransformation


def decay_groups(
    rule: Any,
    factors: Mapping[str, float],
    paths: list[str],
) -> GradientTransformation:
    """Rule whose weight_decay is multiplied by the factor of the first glob that matches a leaf.

    {"*norm*": 0.0} spares the norms; a leaf that no glob matches keeps the rule's own. InputError
    for a glob that matches none of the paths. The state has a part for each factor.
    """
    if not factors:
        return rule
    tree.select(paths, list(factors), "optim: decay factor")
    inner = rule.partitioned() if hasattr(rule, "partitioned") else Partition((rule,), _first)
    distinct = list(dict.fromkeys([1.0, *factors.values()]))
    groups = [_with_decay(part, factor) for part in inner.rules for factor in distinct]

    def choose(path: str, leaf: Tensor) -> int:
        matched = (factor for glob, factor in factors.items() if fnmatchcase(path, glob))
        return inner.choose(path, leaf) * len(distinct) + distinct.index(next(matched, 1.0))

    return Partition(tuple(groups), choose)


def _first(path: str, leaf: Tensor) -> int:
    return 0


def _with_decay(rule: Any, factor: float) -> Any:
    return msgspec.structs.replace(rule, weight_decay=factor * rule.weight_decay)
