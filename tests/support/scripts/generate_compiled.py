"""Number of graphs of a block that generates."""

from functools import partial

import torch

from minitune.inference import generate
from minitune.inference.generate import greedy
from minitune.models import Model
from minitune.models.families import llama

graphs: list[int] = []
generate.STRIDE = 4
config = llama.Config(n_layers=3, n_heads=4, n_kv_heads=2, d_model=12, d_head=6, d_ff=13, vocab_size=17)
model = Model(llama.FAMILY, config)
wrap = partial(torch.compile, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)
run = partial(greedy, params=model.init(0, 0.4), prompts=[[1, 2, 3], [4]], max_new_tokens=25, stop_ids=[])
assert run(model._replace(block_transform=wrap)) == run(model)
print(len(graphs))
