"""Numbers of graphs of plain weights and of weights of all schemes, at two depths."""

from minitune import quant
from minitune.models import Model, llama
from support.scripts.blocks import SIZES, count_whole_graphs, counted, said

count_whole_graphs()
mixed = {"*.self_attn.*": quant.Int4(32), "*.mlp.up_proj.weight": quant.Int8(), "*.mlp.gate_proj.weight": quant.Float8()}
found = []
for scheme, depth in ((None, 2), (quant.NF4(), 2), (quant.NF4(), 3)):
    config = llama.Config(n_layers=depth, **{**SIZES, "d_model": 32, "d_head": 8, "d_ff": 64})
    params = Model(llama.FAMILY, config).init(0, 0.3)
    params = params if scheme is None else quant.Quantization(scheme, exceptions=mixed).quantize(params)
    found.append(counted(llama, config, params, (9, 14, 23)))
print(found, said)
