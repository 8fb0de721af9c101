"""Numbers of kernels that decode a weight of 4 bits, in the form for a CPU and in that for a GPU."""

import torch
from torch._inductor import metrics

from minitune.quant import schemes
from minitune.quant.levels import _levels_at_once, levels_of
from minitune.quant.schemes import NF4, Int4, dequantize, quantize

n_kernels, on_cpu = [], levels_of
for scheme in (Int4(32), NF4()):
    q = quantize(torch.randn(37, 96, generator=torch.Generator().manual_seed(0)), scheme)
    for form in (on_cpu, _levels_at_once):
        expected = dequantize(q, torch.bfloat16)
        schemes.levels_of = form
        metrics.reset()
        torch._dynamo.reset()
        assert torch.equal(torch.compile(dequantize, fullgraph=True)(q, torch.bfloat16), expected)
    n_kernels.append(metrics.generated_kernel_count)
print(n_kernels)
