"""Graphs of compiled blocks whose inputs are sent away, beside those whose inputs are not."""

import torch

from minitune.algorithms.supervised import sft
from minitune.autodiff import offload
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.compile import wrap
from minitune.models.families import llama
from minitune.types import Batch
from support.scripts.blocks import SIZES, count_whole_graphs, graphs

moved: list[int] = []


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy, counted."""
    moved.append(1)
    return x.clone()


count_whole_graphs()
config = llama.Config(n_layers=3, **SIZES)
params, rule = Model(llama.FAMILY, config).init(0, 0.3), Lora(3, 8.0, ("*_proj.weight",))
tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
batch = Batch(tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
on_device, gradients, n_graphs = Model(llama.FAMILY, config, wrap(print), n_remat=3), [], []
for model in (on_device, on_device._replace(remat=offload.remat(offload.Mover(copied, copied, lambda x: x)))):
    objective = sft(model, rule)
    step = value_and_grad(lambda d, objective=objective: objective(d, params, batch), has_aux=True)
    gradients.append(step(rule.init(params, 0)))
    n_graphs.append(len(graphs))
torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
print(n_graphs[0] == n_graphs[1], len(moved))
