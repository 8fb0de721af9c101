"""Two products of quantized weights, eager and compiled: what is kept for the backward, and when each weight is decoded."""

from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from minitune.planning.activations import kept_bytes
from minitune.quant import float8
from minitune.quant.linear import quantized_linear
from minitune.quant.schemes import NF4, Float8, Int4, Int8, quantize

float8.takes = lambda x, codes: True  # torch multiplies them on a CPU too
products: list[Any] = []


def behind(node: Any) -> set[Any]:
    """Every node that this one needs."""
    ancestors: set[Any] = set()
    while new := {above for below in ancestors | {node} for above in below.all_input_nodes} - ancestors:
        ancestors |= new
    return ancestors


def in_order(graph: Any, inputs: Any) -> Any:
    """A weight is decoded when what it multiplies is there, and no earlier."""
    given = [n for n in graph.graph.nodes if n.op == "placeholder" and n.meta["val"].shape == (40, 128)]
    previous = given[-1]  # x, or the cotangent behind what was kept
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.mm.default:
            assert previous in behind(node.args[1])
            previous = node
            products.append(node)
    return make_boxed_func(graph.forward)


def both(x: torch.Tensor, first: Any, second: Any) -> torch.Tensor:
    """Two layers."""
    return quantized_linear(quantized_linear(x, first).tanh(), second)


backend = aot_autograd(fw_compiler=in_order, bw_compiler=in_order, partition_fn=min_cut_rematerialization_partition)
x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
x[0, 0] = torch.inf
for scheme in (Int8(), Float8(), Int4(32), NF4()):
    first, second = (quantize(w, scheme) for w in torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1)))
    torch._dynamo.reset()
    results = []
    for run in (both, torch.compile(both, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(run(leaf, first, second)[1:].float().square().sum(), leaf)[0][1:])
        kept = kept_bytes(run, x, first, second)
        assert kept <= x.nbytes + 1024 + 4096 < 128 * 128, kept
    assert results[1].isfinite().all()
    assert torch.equal(*results)
print("codes", len(products))
