"""How much of a forward the backward keeps, measured on one block of each kind; which blocks are computed again, by a budget."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune import hardware, tree
from minitune.attention import causal
from minitune.grad import fresh, kept_bytes, remat
from minitune.models import decoder
from minitune.tree import Tree
from minitune.types import Deltas, InputError, Params


def n_remat(config: decoder.Config, params: Params, deltas: Deltas, n_rows: int, n_tokens: int, n_bytes: int) -> int:
    """The fewest blocks to compute again in the backward of n_rows x n_tokens so that all blocks together keep at most n_bytes.

    What a block keeps is measured on the last one. InputError if they keep more even when all are computed again.
    """
    like, n = params["model.embed_tokens.weight"], config.n_layers
    computed = hardware.product_dtype(like.dtype, like.device)
    x = torch.ones(n_rows, n_tokens, config.d_model, dtype=computed, device=like.device)
    seen = causal(n_tokens, x.device)
    places = decoder.places_of(config, seen.last, n_tokens, seen, x.dtype)[decoder.layer_kind(config, n - 1)]
    rows = x.numel() * x.element_size()  # what every block keeps, its input
    layer = decoder.layer_of(params, n - 1), decoder.layer_of(deltas, n - 1)
    inner = kept_bytes(_block(config), x, *layer, places)
    found = next((i for i in range(n + 1) if n * rows + (n - i) * inner <= n_bytes), None)
    if found is None:
        raise InputError(
            f"memory: {n} blocks keep {n * rows / 2**20:,.1f} MiB for the backward of {n_rows} x {n_tokens} tokens when all are "
            f"computed again, expected at most {n_bytes / 2**20:,.3g}; take fewer rows at a time (micro_batch_size) or allow more"
        )
    return found


class Span(NamedTuple):
    """Bytes that a function keeps for its backward, its input among them if that is kept, and the most that going back through
    it holds beside those: gradients of its result, its input and its weights too. Where nothing has a gradient: that going
    through it holds."""

    kept: int
    transient: int


def span(f: Callable[..., Tensor], x: Tensor, *rest: Tree) -> Span:
    """The Span of f(x, *rest), whose result counts nowhere; the tensors may be fake (torch._subclasses.FakeTensorMode).

    What an operator allocates for itself, and frees before it returns, is not seen.
    """
    with _Live() as live, torch.enable_grad():
        y = f(x.clone(), *rest)  # a copy, so that it counts if it is kept
        result = y.untyped_storage().nbytes()
        kept, leaves = live.now - result, [leaf for leaf in tree.leaves((x, rest)) if leaf.requires_grad]
        if leaves:
            live.peak = live.now
            torch.autograd.grad(y, leaves, torch.empty_like(y), allow_unused=True)
    return Span(kept, live.peak - kept - result)


def block_spans(
    config: decoder.Config, n_remat: int, params: Params, deltas: Deltas, x: Tensor, places: dict[decoder.Kind, decoder.Places]
) -> list[Span]:
    """The Span of every block, given where the tokens stand and a tensor x [B T D] that has a gradient if the embedding has one;
    blocks that are alike are measured once."""
    spans: list[Span] = []
    known: dict[Any, Span] = {}
    for i in range(config.n_layers):
        kind, own = decoder.layer_kind(config, i), (decoder.layer_of(params, i), decoder.layer_of(deltas, i))
        leaves = tuple((path, leaf.shape, leaf.dtype, leaf.requires_grad) for path, leaf in tree.items(own))
        alike = (kind, i < n_remat, x.requires_grad, leaves)
        if alike not in known:
            run = _block(config)
            known[alike] = span(remat(run) if i < n_remat else run, x, *own, places[kind])
        spans.append(known[alike])
        x = fresh(x) if any(leaf.requires_grad for leaf in tree.leaves(own)) else x
    return spans


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), made=False)
        value = func(*args, **(kwargs or {}))
        self._note(value, made=True)
        return value

    def _note(self, value: Any, made: bool) -> None:
        for x in tree_leaves(value):
            if not isinstance(x, Tensor) or (storage := x.untyped_storage())._cdata in self._known:
                continue
            n_bytes = storage.nbytes() if made else 0
            self._known.add(storage._cdata)
            self.now, self.peak = self.now + n_bytes, max(self.peak, self.now + n_bytes)
            weakref.finalize(storage, self._freed, storage._cdata, n_bytes)

    def _freed(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now = self.now - n_bytes


def _block(config: decoder.Config) -> Callable[..., Tensor]:
    def block(x: Tensor, w: Params, own: Deltas, places: decoder.Places) -> Tensor:
        return decoder.block(config, w, own, x, places)

    return block
