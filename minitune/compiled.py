"""Compiled blocks: each compiled once, whatever the depth, the steps and the lengths; without a compiler they run as they are."""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

Block = Callable[..., Tensor]


def wrap(say: Callable[[str], None]) -> Callable[[Block], Block]:
    """A model's `wrap` that compiles the first block of each kind and lets it serve all others; `say` is told if it can't.

    A block is a partial of one function and one config, made anew by every forward: what was compiled is known by those two.
    """
    kept: dict[Hashable, Block] = {}

    def once(block: Block) -> Block:
        key = (block.func, *block.args) if isinstance(block, partial) else block
        if key not in kept:
            kept[key] = _guarded(block, say)
        return kept[key]

    return once


def _guarded(block: Block, say: Callable[[str], None]) -> Block:
    """The compiled block, or the block itself from the first time on that it could not be compiled."""
    from torch._dynamo.exc import TorchDynamoException  # it takes a second, which nobody else should wait

    runs = [torch.compile(block)]

    def run(*args: object) -> Tensor:
        try:
            return runs[-1](*args)
        except TorchDynamoException as error:  # what is wrong with the arguments is not of this kind
            if len(runs) > 1:
                raise
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            say(f"compiled: blocks run as they are, because torch.compile could not compile them ({why})")
            runs.append(block)
            return block(*args)

    return run
