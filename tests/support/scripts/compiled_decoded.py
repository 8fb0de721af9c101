"""Numbers of kernels that decode a weight of 4 bits, in the form for a CPU and in that for a GPU."""

import torch
from torch._inductor import metrics

from minitune import quant

found, on_cpu = [], quant._levels
for scheme in (quant.Int4(32), quant.NF4()):
    q = quant.quantize(torch.randn(37, 96, generator=torch.Generator().manual_seed(0)), scheme)
    for form in (on_cpu, quant._levels_at_once):
        expected = quant.dequantize(q, torch.bfloat16)
        quant._levels = form
        metrics.reset()
        torch._dynamo.reset()
        assert torch.equal(torch.compile(quant.dequantize, fullgraph=True)(q, torch.bfloat16), expected)
    found.append(metrics.generated_kernel_count)
print(found)
