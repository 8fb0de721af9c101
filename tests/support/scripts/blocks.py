"""What the scripts about compiled blocks share: a step of a small model, and a count of the graphs that torch makes."""

import functools
from typing import Any

import torch

from minitune import steps
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.models import Model
from minitune.models import compile as compiled
from minitune.models.compile import wrap
from minitune.optim.sgd import SGD
from minitune.types import Batch, TrainState

SIZES = {"n_heads": 4, "n_kv_heads": 2, "d_model": 16, "d_head": 6, "d_ff": 13, "vocab_size": 17}
graphs: list[int] = []
said: list[str] = []


def stepped(model: Model, length: int, params: Any) -> Any:
    """New deltas, optimizer state and metrics after one step on a batch of this length."""
    rule, optimizer = Lora(3, 8.0, ("*_proj.weight",)), SGD(0.1)
    deltas = rule.init(params, 0)
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 17, (2, length), generator=generator)
    segments = 1 + (torch.rand(2, length, generator=generator) < 0.1).int().cumsum(1).int()
    batch = Batch(tokens, segments, torch.ones_like(tokens, dtype=torch.bool))
    step = steps.train_step(sft(model, rule), optimizer, micro_batch=2)
    return step.update(params, TrainState(deltas, optimizer.init(deltas)), batch)


def same(a: Any, b: Any) -> None:
    """Equal but for the rounding of float32."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def counting(graph: Any, inputs: Any) -> Any:
    """A backend that counts its graphs and runs them as they are."""
    graphs.append(1)
    return graph.forward


def count_whole_graphs() -> None:
    """From here on a block is compiled by `counting`, and a block that is not one graph is an error."""
    compiled._lowered, torch.compile = counting, functools.partial(torch.compile, fullgraph=True)


def counted(family: Any, config: Any, params: Any, lengths: tuple[int, ...] = (9, 9, 14, 23)) -> int:
    """Number of graphs for steps on batches of these lengths, recomputed and not, each equal to the plain step."""
    torch._dynamo.reset()
    plain, wrapped = Model(family.FAMILY, config), Model(family.FAMILY, config, wrap(said.append))
    before = len(graphs)
    for n_remat in (0, 1):
        for length in lengths:
            ours, theirs = (stepped(m._replace(n_remat=n_remat), length, params) for m in (wrapped, plain))
            same(ours[0], theirs[0])
    return len(graphs) - before
