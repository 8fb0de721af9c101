"""Several optimizers for one tree of parameters: each leaf is updated by one of them."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from minitune import tree
from minitune.errors import InputError
from minitune.optim.transforms import GradientTransformation
from minitune.tree import Tree


class Branch(NamedTuple):
    """One rule of a partition with its state, and the numbers of its leaves in the order of the
    whole tree.
    """

    rule: GradientTransformation
    state: Tree
    numbers: Sequence[int]


class Partition(NamedTuple):
    """Rules, and the function (path, leaf) -> number of the rule that updates the leaf.

    The state is a tuple with that of each rule, which knows its leaves by their paths; () for a
    rule without leaves.
    """

    rules: tuple[GradientTransformation, ...]
    choose: Callable[[str, Tensor], int]

    def init(self, params: Tree) -> tuple[Tree, ...]:
        """Each rule's state of its own leaves."""
        return tuple(
            rule.init(own) if own else ()
            for rule, own in zip(self.rules, self._split(params, params), strict=True)
        )

    def update(
        self, grads: Tree, state: Sequence[Tree], params: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        """Each rule's updates of its own leaves, in the structure of grads."""
        updates, states = {}, []
        trees = zip(
            self.rules, self._split(grads, params), state, self._split(params, params), strict=True
        )
        for rule, own_grads, own_state, own_params in trees:
            new, after = rule.update(own_grads, own_state, own_params) if own_params else ({}, ())
            updates |= new
            states.append(after)
        return tree.rebuild(grads, [updates[path] for path, _ in tree.items(params)]), tuple(states)

    def branches(
        self, state: Sequence[Tree], paths: Sequence[str], leaves: Sequence[Tensor]
    ) -> list[Branch]:
        """Rules that have leaves, with these."""
        chosen = [self.choose(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        numbers = [
            [i for i, choice in enumerate(chosen) if choice == rule]
            for rule in range(len(self.rules))
        ]
        return [
            Branch(*branch) for branch in zip(self.rules, state, numbers, strict=True) if branch[2]
        ]

    def _split(self, values: Tree, params: Tree) -> list[dict[str, Tensor]]:
        """Leaves of `values` that each rule updates, by path."""
        own: list[dict[str, Tensor]] = [{} for _ in self.rules]
        for (path, p), value in zip(tree.items(params), tree.leaves(values), strict=True):
            own[self.choose(path, p)][path] = value
        return own


def partition(rules: Mapping[str, GradientTransformation]) -> Partition:
    """Give each leaf to the rule of the first glob that matches its path: {"*norm*":
    AdamW(lr=1e-3), "*": SGD(lr=0.1)}.

    InputError for a leaf that no glob matches.
    """

    def choose(path: str, leaf: Tensor) -> int:
        for number, glob in enumerate(rules):
            if fnmatchcase(path, glob):
                return number
        raise InputError(
            f"optim: no glob of the partition matches {path!r} (only {', '.join(rules)}); end it "
            "with '*'"
        )

    return Partition(tuple(rules.values()), choose)
