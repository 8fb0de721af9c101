"""Ten models of one layer in one process: how often the compiled block of each has run."""

from typing import Any

from minitune.models import Model
from minitune.models import compile as compiled
from minitune.models.compile import wrap
from minitune.models.families import gemma2
from support.scripts.blocks import SIZES, said, stepped

ran: list[int] = []


def running(graph: Any, inputs: Any) -> Any:
    """A backend that counts how often its graphs run."""
    return lambda *args: (ran.append(1), graph.forward(*args))[1]


compiled._lowered = running
for cap in range(1, 11):
    config = gemma2.Config(n_layers=1, **SIZES, attention_cap=float(cap), final_cap=None)
    params, before = Model(gemma2.FAMILY, config).init(0, 0.3), len(ran)
    stepped(Model(gemma2.FAMILY, config, wrap(said.append)), 9, params)
    print(len(ran) - before, end=" ")
print(said)
