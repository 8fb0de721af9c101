"""Whether a probe of compiled blocks receives what it receives of plain ones, with the same gradients."""

from typing import Any

import torch

from minitune.autodiff.value_and_grad import value_and_grad
from minitune.models import Model, Probe
from minitune.models.compile import wrap
from minitune.models.families import llama
from minitune.types import Batch, Mean
from support.scripts.blocks import SIZES, count_whole_graphs, graphs, said

count_whole_graphs()
WEIGHTS = ("self_attn.v_proj.weight", "mlp.up_proj.weight")
config = llama.Config(n_layers=3, **SIZES)
params = {name: w.double() for name, w in Model(llama.FAMILY, config).init(0, 0.3).items()}
tokens = torch.arange(18).view(2, 9) % 17
batch = Batch(tokens, torch.ones_like(tokens), tokens > 3)


def probed(model: Model) -> tuple[list[str], Any]:
    """Names and outputs that the probe received, and the objective's value and gradients."""
    received: list[tuple[str, torch.Tensor]] = []
    model = model._replace(probe=Probe(WEIGHTS, lambda *given: received.append(given)))

    def objective(leaves: Any) -> tuple[Mean, torch.Tensor]:
        received.clear()
        hidden = model.hidden(leaves, batch)
        total = hidden.square().sum() + sum(y.sin().sum() for _, y in received)
        return Mean(total, torch.ones(())), hidden

    answer = value_and_grad(objective, has_aux=True)(params)
    return [name for name, _ in received], ([y.detach() for _, y in received], answer)


names, wanted = probed(Model(llama.FAMILY, config))
for n_remat in (0, 2):
    actual_names, actual = probed(Model(llama.FAMILY, config, wrap(said.append), n_remat=n_remat))
    assert actual_names == names
    assert len(names) == 2 * config.n_layers
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
print(len(graphs) > 0, said)
