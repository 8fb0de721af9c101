"""Prints by how much a training step with weights in float32 makes the anonymous memory of a process grow, in bytes.

Arguments: a model folder, and where its blocks lie ("device" or "disk").
"""

import re
import sys
from pathlib import Path
from typing import Any

from minitune.lora import Lora
from minitune.models.block import block
from minitune.optim.adamw import AdamW
from minitune.programs.loading import ModelSource, load
from minitune.steps import sft_step
from support.models import random_batch


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    return 1024 * int(re.findall(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)[0])


def noted(*args: Any, **kwargs: Any) -> Any:
    seen.append(anonymous())
    return block(*args, **kwargs)


folder, place = sys.argv[1:]
rule, seen = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",)), [anonymous()]
source = ModelSource(path=folder, device="cpu", dtype="float32", offload=None if place == "device" else "disk")
loaded = load(source, Path(), 0)
deltas, batch = rule.init(loaded.params, 0), random_batch(loaded.model.config, 1, 5)
step = sft_step(loaded.model._replace(block=noted), rule, AdamW(lr=0.01))
step.update(loaded.params, step.init(deltas), batch)
print(max(*seen, anonymous()) - seen[0])
