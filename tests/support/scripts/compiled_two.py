"""Two models with one wrap."""

import torch

from minitune.models import Model
from minitune.models import compile as compiled
from minitune.models.families import gemma2
from support.scripts.blocks import SIZES, said, same, stepped

torch.compile = lambda block, **how: block
wrap, models = compiled.wrap(said.append), []
for cap in (None, 0.3):
    config = gemma2.Config(n_layers=2, **SIZES, attention_cap=cap, final_cap=None)
    models.append((Model(gemma2.FAMILY, config, wrap), Model(gemma2.FAMILY, config), Model(gemma2.FAMILY, config).init(0, 0.7)))
for ours, theirs, params in models + models:
    same(stepped(ours, 9, params)[0], stepped(theirs, 9, params)[0])
print("same")
