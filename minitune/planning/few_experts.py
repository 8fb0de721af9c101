"""Mixtures of many experts that stand one by one: what a block needs is measured with a few of its
experts, and follows from these."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from minitune import tree
from minitune.models.config import DecoderConfig
from minitune.models.experts import Experts, expert_shapes, is_routed
from minitune.models.fused_experts import SINGLE
from minitune.tree import Tree
from minitune.types import Adapted

# experts that are measured, in those that each token goes through; there have to be many times as
# many for it to be worth while
FEW, MORE, LEAST = 1, 2, 6
SMALL_SHARE = 0.1  # of a block's memory


class BlockOfExperts(NamedTuple):
    """Leaves of a block, and its config, which says how many experts there are."""

    config: DecoderConfig
    layer: Mapping[str, Any]

    @property
    def experts(self) -> Experts:
        """Numbers of the mixture."""
        assert self.config.experts is not None, "the model has no experts"
        return self.config.experts

    def with_experts(self, n: int) -> "BlockOfExperts":
        """Block with its first n experts alone."""
        experts = msgspec.structs.replace(self.experts, n_experts=n)
        every = expert_shapes(self.experts, self.config.d_model)
        few = expert_shapes(experts, self.config.d_model)
        layer = {
            # the router alone has a row for each expert
            name: _rows(w, n) if name in few and few[name] != every[name] else w
            for name, w in self.layer.items()
            if name in few or name not in every
        }
        return BlockOfExperts(msgspec.structs.replace(self.config, experts=experts), layer)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all experts."""
        leaves = tree.leaves([w for name, w in self.layer.items() if SINGLE.fullmatch(name)])
        return sum(x.numel() * x.element_size() for x in leaves if x.requires_grad)

    @property
    def is_large(self) -> bool:
        """True for many experts that stand one by one and are alike, and a router that can be cut
        to fewer."""
        experts = self.config.experts
        if experts is None or experts.n_experts < LEAST * experts.n_active:
            return False
        if not is_routed(experts, self.layer):
            return False
        kinds: dict[str, set[Any]] = {}
        for name, w in self.layer.items():
            if (single := SINGLE.fullmatch(name)) is not None:
                kinds.setdefault(single[2], set()).add((single[3], *_kind(w)))
        first, *others = kinds.values() or [set()]
        routers = [self.layer[name] for name in self._router_names()]
        alike = len(kinds) == experts.n_experts and all(other == first for other in others)
        return alike and all(isinstance(w, Tensor | Adapted) for w in routers)

    def _router_names(self) -> list[str]:
        every = expert_shapes(self.experts, self.config.d_model)
        return [name for name in every if name in self.layer and not SINGLE.fullmatch(name)]


def measured_with_few(
    measure: Callable[[BlockOfExperts], tuple[int, int]], block: BlockOfExperts
) -> tuple[int, int]:
    """(kept, transient) bytes of a block, as measure(block) finds them.

    The rows of all experts together are as many however many there are: with each expert more, what
    is needed grows by the same. That holds at one moment of a backward; another, with more
    gradients, may be fuller with all experts. So it is measured with all of them if their gradients
    are no small part.
    """
    if not block.is_large:
        return measure(block)
    experts = block.experts
    few, more = (n * experts.n_active for n in (FEW, MORE))
    of_few, of_more = (measure(block.with_experts(n)) for n in (few, more))
    rest = experts.n_experts - more
    kept, transient = (
        b + (b - a) * rest // (more - few) for a, b in zip(of_few, of_more, strict=True)
    )
    if block.gradient_bytes > SMALL_SHARE * (kept + transient):
        return measure(block)
    return kept, transient


def _kind(w: Tree) -> tuple[Any, ...]:
    return type(w), *((x.shape, x.dtype, x.requires_grad) for x in tree.leaves(w))


def _rows(w: Any, n: int) -> Any:
    """First n rows of a weight, with their low-rank change."""
    if isinstance(w, Adapted):
        m = w.m[:n] if isinstance(w.m, Tensor) else w.m
        return w._replace(w=w.w[:n], b=w.b[:n], m=m)
    return w[:n]
