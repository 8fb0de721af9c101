"""Numbers of graphs of a deep model, one with two kinds of layers, and a shallow one with weights of all schemes."""

from minitune.models import Model
from minitune.models.families import gemma2, llama
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Float8, Int4, Int8
from support.scripts.blocks import SIZES, count_whole_graphs, counted, said

count_whole_graphs()
wide = {**SIZES, "d_model": 32, "d_head": 8, "d_ff": 64}  # which the groups of the schemes divide
mixed = {"*.self_attn.*": Int4(32), "*.mlp.up_proj.weight": Int8(), "*.mlp.gate_proj.weight": Float8()}
n_graphs = []
for family, depth, sizes in ((llama, 5, SIZES), (gemma2, 2, SIZES), (llama, 2, wide)):
    config = family.Config(n_layers=depth, **sizes)
    params = Model(family.FAMILY, config).init(0, 0.3)
    params = Quantization(NF4(), exceptions=mixed).quantize(params) if sizes is wide else params
    n_graphs.append(counted(family, config, params))
print(n_graphs, said)
