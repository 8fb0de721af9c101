"""Two training steps that are not compiled, and which they imported of torch's compiler and its DTensor."""

import sys

from minitune.lora import Lora
from minitune.optim.adamw import AdamW
from minitune.steps import sft_step
from support.models import SMALL, model_of, random_batch, random_params

params, lora = random_params(SMALL), Lora(2, 4.0, ("*_proj.weight",))
step = sft_step(model_of(SMALL), lora, AdamW(lr=1e-3))
state = step.init(lora.init(params, 0))
for seed in range(2):
    state, _ = step.update(params, state, random_batch(SMALL, 2, 11, seed))
print([name for name in ("torch._dynamo", "torch.distributed.tensor") if name in sys.modules])
