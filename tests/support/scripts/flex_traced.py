"""Graphs of a block traced as on CUDA, and the tensors of T x T in them."""

from typing import Any

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch._dynamo.backends.registry import lookup_backend

from minitune.models import Model
from minitune.models import compile as compiled
from minitune.models.compile import wrap
from minitune.models.families import gemma2
from minitune.nn.attention import flex
from support.scripts.blocks import SIZES, count_whole_graphs, graphs, said, same, stepped

torch_flex._validate_device = lambda *_: None
flex.serves = lambda q, k, v: torch.compiler.is_compiling()
lengths = (200, 300, 517)
square: list[str] = []


def tracing(graph: Any, inputs: Any) -> Any:
    """A backend that counts its graphs and notes square tensors."""
    graphs.append(1)
    shapes = [n.meta["example_value"].shape for n in graph.graph.nodes if isinstance(n.meta.get("example_value"), torch.Tensor)]
    for a, b in ((str(s[-2]), str(s[-1])) for s in shapes if len(s) > 1):  # as text: a comparison would fix a length that is free
        square.extend([a] if a == b and (a.isidentifier() or a in map(str, lengths)) else [])
    return lookup_backend("aot_eager")(graph, inputs) if len(graphs) > 2 else graph.forward  # the backward of any length too


count_whole_graphs()
compiled._lowered = tracing
config = gemma2.Config(n_layers=2, **SIZES, attention_cap=0.7, window=150, sinks=True)
params = Model(gemma2.FAMILY, config).init(0, 0.3)
plain, wrapped = Model(gemma2.FAMILY, config), Model(gemma2.FAMILY, config, wrap(said.append))
for length in lengths:
    ours, theirs = (stepped(m, length, params) for m in (wrapped, plain))
    same(ours[0], theirs[0])
    print(len(graphs), end=" ")
print(square, said)
