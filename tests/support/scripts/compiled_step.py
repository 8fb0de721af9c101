"""A whole step by torch.compile, in one graph, beside the step as it is: number of graphs, and the largest difference of each
leaf of state and metrics after three steps, the second on rows without a target, relative to the leaf."""

import torch

from minitune import tree
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.nn.dropout import seeded
from minitune.optim import AdamW, ClipByGlobalNorm, Cosine, ScaleBySchedule, chain
from minitune.steps import train_step
from support.families import sized
from support.models import model_of, random_batch, random_deltas, random_params

config = sized("llama", n_layers=1)
params, rule = random_params(config, 3), Lora(2, 4.0, ("*.q_proj.weight", "*.down_proj.weight"), dropout=0.25)
deltas = random_deltas(params, rule)
schedule = ScaleBySchedule(Cosine(warmup_steps=1, end=0.1), total_steps=5)
optimizer = chain(ClipByGlobalNorm(0.5), AdamW(lr=1e-2, weight_decay=0.1), schedule)
step = train_step(sft(model_of(config), rule), optimizer)
compiled = torch.compile(step.update, backend="aot_eager", fullgraph=True)

batches = [random_batch(config, 4, 9, seed=i) for i in range(3)]
batches[1] = batches[1]._replace(loss_mask=torch.zeros_like(batches[1].loss_mask))
batches = [seeded(batch, 7, i) for i, batch in enumerate(batches)]
plain, ours = step.init(deltas), step.init(deltas)
worst, skipped = 0.0, []
for batch in batches:
    plain, wanted = step.update(params, plain, batch)
    ours, metrics = compiled(params, ours, batch)
    skipped.append(int(metrics["skipped"]))
    for x, y in zip(tree.leaves((plain, wanted)), tree.leaves((ours, metrics)), strict=True):
        worst = max(worst, float((x.double() - y.double()).abs().max() / x.abs().max().clamp(min=1e-3)))
n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore[reportAttributeAccessIssue]
print([n_graphs, skipped, worst])
