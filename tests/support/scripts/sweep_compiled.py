"""Number of graphs of a block of several adapters, and their step against the plain one."""

from typing import Any

import torch

from minitune import tree
from minitune.algorithms import sweep
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.sgd import SGD
from minitune.types import Batch

graphs: list[int] = []


def compiled(block: Any) -> Any:
    """The block in one graph, counted."""
    return torch.compile(block, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)


def same(x: torch.Tensor, y: torch.Tensor) -> None:
    """Either is within 2e-6 of float64, as a share of a leaf's largest value: sums of other orders."""
    torch.testing.assert_close(x, y, rtol=0.0, atol=1e-5 * float(y.abs().max()))


config = llama.Config(n_layers=5, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17)
model = Model(llama.FAMILY, config)
params, rule = model.init(0, 0.4), Lora(3, 8.0, ("*_proj.weight",), dora=True)
deltas = sweep.stack([rule.init(params, seed) for seed in range(3)])
tokens = torch.randint(0, 17, (3, 2, 9), generator=torch.Generator().manual_seed(0))
batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.int32), tokens > 3)
optimizers = [SGD(lr) for lr in (0.1, 0.2, 0.3)]


def run(model: Model) -> Any:
    """One step of the three."""
    step = sweep.sweep_step(model, CrossEntropy(), [rule] * 3, optimizers, micro_batch=2)
    return step.update(params, step.init(deltas), batch)


((actual, _), ours), ((wanted, _), theirs) = run(model._replace(block_transform=compiled)), run(model)
tree.map(same, (actual, ours), (wanted, theirs))
print(len(graphs))
