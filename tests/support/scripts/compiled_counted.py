"""Numbers of graphs of a shallow model, a deep one, and one with two kinds of layers."""

from minitune.models import Model
from minitune.models.families import gemma2, llama
from support.scripts.blocks import SIZES, count_whole_graphs, counted, said

count_whole_graphs()
n_graphs = []
for family, depth in ((llama, 2), (llama, 5), (gemma2, 2)):
    config = family.Config(n_layers=depth, **SIZES)
    n_graphs.append(counted(family, config, Model(family.FAMILY, config).init(0, 0.3)))
print(n_graphs, said)
