"""Numbers of graphs of plain weights and of weights of all schemes, at two depths."""

from minitune.models import Model
from minitune.models.families import llama
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Float8, Int4, Int8
from support.scripts.blocks import SIZES, count_whole_graphs, counted, said

count_whole_graphs()
mixed = {"*.self_attn.*": Int4(32), "*.mlp.up_proj.weight": Int8(), "*.mlp.gate_proj.weight": Float8()}
n_graphs = []
for scheme, depth in ((None, 2), (NF4(), 2), (NF4(), 3)):
    config = llama.Config(n_layers=depth, **{**SIZES, "d_model": 32, "d_head": 8, "d_ff": 64})
    params = Model(llama.FAMILY, config).init(0, 0.3)
    params = params if scheme is None else Quantization(scheme, exceptions=mixed).quantize(params)
    n_graphs.append(counted(llama, config, params, (9, 14, 23)))
print(n_graphs, said)
