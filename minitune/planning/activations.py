"""Memory that a forward keeps for its backward, measured on one block of each kind; which blocks
are recomputed, by a budget.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune import hardware, tree
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import detached_leaves
from minitune.errors import InputError
from minitune.models import decoder
from minitune.models.config import LayerKind, layer_kind
from minitune.models.model import Model
from minitune.models.weights import layer_of
from minitune.planning.few_experts import BlockOfExperts, measured_with_few
from minitune.sharding.gather import gather_for_block
from minitune.tree import Tree
from minitune.types import Params


def n_remat(model: Model, params: Params, n_rows: int, n_tokens: int, n_bytes: int) -> int:
    """Fewest blocks to recompute in the backward of n_rows x n_tokens so that all blocks together
    keep at most n_bytes.

    What a block keeps is measured on the last one. InputError if they keep more even when all are
    computed again.
    """
    config = model.config
    like, n = params["model.embed_tokens.weight"], config.n_layers
    dtype = hardware.product_dtype(like.dtype, like.device)
    n_own = n_tokens if model.shares is None else model.shares.n_own(n_tokens)
    x = torch.ones(n_rows, n_own, config.d_model, dtype=dtype, device=like.device)
    tokens = torch.ones(n_rows, n_tokens, dtype=torch.int64, device=like.device)
    where = decoder.token_positions(config, tokens, None, model.shares)
    inputs = decoder.mixer_inputs(config, where, x.dtype)
    rows = x.numel() * x.element_size()  # what every block keeps, its input
    last = layer_kind(config, n - 1)
    weights = gather_for_block(layer_of(params, n - 1), model.in_part())
    inner = kept_bytes(_x_first(model, last), x, weights, inputs[last])
    fewest = next((i for i in range(n + 1) if n * rows + (n - i) * inner <= n_bytes), None)
    if fewest is None:
        raise InputError(
            f"memory: {n} blocks keep {n * rows / 2**20:,.1f} MiB for the backward of {n_rows} x "
            f"{n_tokens} tokens when all are computed again, expected at most "
            f"{n_bytes / 2**20:,.3g}; take fewer rows at a time (micro_batch_size) or allow more"
        )
    return fewest


class BlockMemory(NamedTuple):
    """Bytes that a block needs in a training step."""

    kept: int  # for its backward, its input included if that is kept
    # the most that its backward adds, gradients included; its forward, if nothing has a gradient
    transient: int


def measure(f: Callable[..., Tensor], x: Tensor, *rest: Tree) -> BlockMemory:
    """Memory of f(x, *rest), whose result counts nowhere; the tensors may be fake
    (torch._subclasses.FakeTensorMode).

    What an operator allocates for itself, and frees before it returns, is not counted.
    """
    with _Live() as live, torch.enable_grad():
        y = f(x.clone(), *rest)  # a copy, so that it counts if it is kept
        result = y.untyped_storage().nbytes()
        kept, leaves = (
            live.now - result,
            [leaf for leaf in tree.leaves((x, rest)) if leaf.requires_grad],
        )
        if leaves:
            live.peak = live.now
            torch.autograd.grad(y, leaves, torch.empty_like(y), allow_unused=True)
    return BlockMemory(kept, live.peak - kept - result)


def measure_blocks(
    model: Model,
    params: Params,
    alike: Sequence[int],
    x: Tensor,
    inputs: dict[LayerKind, Any],
) -> list[BlockMemory]:
    """Memory of every block, given its attention inputs and an x [B T D] that has a gradient if the
    embedding has one.

    alike: for each layer the one that stands for it, of which params hold the weights. Blocks that
    are alike are measured once.
    """
    measured: list[BlockMemory] = []
    known: dict[Any, BlockMemory] = {}
    layers = {i: layer_of(params, i) for i in set(alike)}
    for i, first in enumerate(alike):
        kind, layer = layer_kind(model.config, i), layers[first]
        key = (first, i < model.n_remat, x.requires_grad)
        if key not in known:
            block = BlockOfExperts(model.config, layer)
            of_block = partial(_measure_block, model, kind, i < model.n_remat, x, inputs[kind])
            known[key] = BlockMemory(*measured_with_few(of_block, block))
        measured.append(known[key])
        x = detached_leaves(x) if any(leaf.requires_grad for leaf in tree.leaves(layer)) else x
    return measured


def _measure_block(
    model: Model, kind: LayerKind, again: bool, x: Tensor, inputs: Any, block: BlockOfExperts
) -> BlockMemory:
    """Memory of a block, which is computed again in the backward or not."""
    run = _x_first(model._replace(config=block.config), kind)
    return measure(remat(run) if again else run, x, block.layer, inputs)


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


def _x_first(model: Model, kind: LayerKind) -> Callable[..., Tensor]:
    """Block as a function of x and then of the rest, which is how memory is measured."""
    return lambda x, w, inputs: model.block(model.config, kind.mixer, w, x, inputs)


def kept_bytes(f: Callable[..., Tensor], x: Tensor, *rest: Tree) -> int:
    """Bytes that f(x, *rest), differentiated in x, keeps for its backward: without x and rest, each
    memory once.
    """
    given = {_memory(leaf) for leaf in tree.leaves((x, rest))}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        if _memory(saved) not in given:
            kept[_memory(saved)] = saved.untyped_storage().nbytes()
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        value = f(detached_leaves(x), *rest)
    del value  # only now: the memory of its graph was not to be reused before all was counted
    return sum(kept.values())


def _memory(x: Tensor) -> int:
    # and not its address, which tensors without values do not have
    return x.untyped_storage()._cdata
