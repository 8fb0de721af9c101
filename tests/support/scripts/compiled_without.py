"""A step where there is no compiler."""

from minitune.models import Model
from minitune.models.compile import wrap
from minitune.models.families import llama
from support.scripts.blocks import SIZES, said, same, stepped

config = llama.Config(n_layers=2, **SIZES)
params = Model(llama.FAMILY, config).init(0, 0.3)
ours = stepped(Model(llama.FAMILY, config, wrap(said.append)), 9, params)
same(ours[0], stepped(Model(llama.FAMILY, config), 9, params)[0])
print(len(said), said[0])
