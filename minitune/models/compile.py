"""Compiled blocks: each compiled once, whatever the depth, the steps and the lengths; without a
compiler they run as they are.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from minitune.autodiff.value_and_grad import in_forward_mode
from minitune.models.block import BlockFunction

# A block needs a graph for every combination of: input with and without a gradient, forward for a
# backward or alone, the first length and any length, rows of up to 128 tokens and longer ones,
# layers with and without RoPE, layers with and without experts
OWN_LIMIT = {"isolate_recompiles": True, "recompile_limit": 2**6}


def wrap(say: Callable[[str], None]) -> Callable[[BlockFunction], BlockFunction]:
    """Block transform that compiles the first block of each kind and lets it serve all others;
    calls `say` if it can't.

    A block is a partial of one function and one config, made anew by every forward: what was
    compiled is known by those two.
    """
    kept: dict[Hashable, BlockFunction] = {}

    def once(block: BlockFunction) -> BlockFunction:
        key = (block.func, *block.args) if isinstance(block, partial) else block
        if key not in kept:
            kept[key] = _guarded(block, say)
        return kept[key]

    return once


def _guarded(block: BlockFunction, say: Callable[[str], None]) -> BlockFunction:
    """Compiled block, or the block itself once it could not be compiled."""
    # it takes a second, which nobody else should wait
    from torch._dynamo.exc import TorchDynamoException

    runs = [_compiled(block)]

    def run(*args: object) -> Tensor:
        if in_forward_mode():  # of which a compiled block knows nothing
            return block(*args)
        try:
            return runs[-1](*args)
        # what is wrong with the arguments is not of this kind
        except TorchDynamoException as error:
            if len(runs) > 1:
                raise
            why = next(
                (line for line in str(error).splitlines() if line.strip()), type(error).__name__
            )
            say(
                "compiled: blocks run as they are, because torch.compile could not compile them "
                f"({why})"
            )
            runs.append(block)
            return block(*args)

    return run


def _compiled(block: BlockFunction) -> BlockFunction:
    """torch.compile of a block, with a limit of graphs that is its own.

    All partials are compiled through one function of torch's. Where they share its limit of 8, each
    block's graphs are taken from the next one's, and what is beyond runs uncompiled. A torch
    without these two options can't keep blocks apart.
    """
    known = signature(torch.compile).parameters
    how: dict[str, Any] = {name: value for name, value in OWN_LIMIT.items() if name in known}
    return torch.compile(block, backend=_lowered, **how)


def _lowered(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor's code of a graph and of its backward: left to the first backward, an error of the
    latter would be met where no block can be run in its place.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(force_non_lazy_backward_lowering=True):
        return compile_fx(graph, inputs)
