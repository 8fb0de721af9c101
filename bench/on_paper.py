"""Models on ranks that are not there: what each of them holds and sends in a step, the table of docs/scaling.md.

    python bench/on_paper.py [WORD ...]        all rows, or those whose words are all there, e.g. `llama-3-70b 64`

bfloat16 weights, all of them trained or LoRA of rank 16 on all linear ones, AdamW, blocks computed again, 4,096 tokens a
rank in one micro-batch. With "tensor 8" the ranks of a node share linear maps, and rows of 8 times as many tokens, in
documents of 4,096; with "expert 8" they share experts. Arithmetic on shapes: nothing is allocated, nothing is sent.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from minitune import models
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models.weights import shapes
from minitune.optim.adamw import AdamW
from minitune.planning.devices import open_device
from minitune.planning.flops import flops_per_token
from minitune.planning.memory import peak_memory
from minitune.planning.mesh import mesh_under
from minitune.planning.step_spec import StepSpec
from minitune.planning.timing import timing

ROOT = Path(__file__).parents[1]
MODELS, KINDS = ("llama-3-70b", "qwen3-235b-a22b"), ("lora", "full")


class Layout(NamedTuple):
    """How ranks stand, and the plan by which they hold weights."""

    axes: dict[str, int]
    plan: str
    model: str | None = None  # None: every one


LAYOUTS = {
    "64": Layout({"data": 64}, "fsdp"),
    "256": Layout({"data": 256}, "fsdp"),
    "1024": Layout({"data": 1024}, "fsdp"),
    "8 x 8": Layout({"replica": 8, "data": 8}, "hsdp"),
    "64 x 16": Layout({"replica": 16, "data": 64}, "hsdp"),
    **{f"{n}, tensor 8": Layout({"data": n // 8, "tensor": 8}, "tp_fsdp", "llama-3-70b") for n in (64, 256, 1024)},
    **{f"{n}, expert 8": Layout({"data": n // 8, "expert": 8}, "ep", "qwen3-235b-a22b") for n in (64, 256, 1024)},
}
N_TOKENS, GIB = 4096, 2**30
HEADER = (
    "model",
    "trains",
    "ranks, or parts x copies",
    "state",
    "gathered",
    "rest",
    "sum, GiB",
    "sent, GiB",
    "links, s",
    "exchanges, s",
    "products, s",
)


def row(name: str, kind: str, ranks: str) -> str:
    """One row of the table."""
    model = models.open_config(ROOT / f"configs/models/{name}.toml")
    model = model._replace(n_remat=model.config.n_layers)
    sizes = shapes(model.config)
    params = {one: torch.empty(size, device="meta", dtype=torch.bfloat16) for one, size in sizes.items()}
    lora = Lora(16, 32.0, ("*_proj.weight",)) if kind == "lora" else None
    with torch.device("meta"):
        whole = {one: torch.empty(size) for one, size in sizes.items()} if lora is None else {}
        trainable = whole if lora is None else lora.like(params)
    layout, device = LAYOUTS[ranks], torch.device("meta")
    mesh = mesh_under(layout.axes, layout.plan).for_model(model.config)
    n_tokens = N_TOKENS * mesh.n_sharers  # of a row
    step = StepSpec(model, params, trainable, lora, AdamW(lr=1e-4), CrossEntropy(), device, 1, n_tokens, mesh=mesh)
    parts = peak_memory(step)
    time = timing(step, flops_per_token(model, trainable, N_TOKENS), parts, open_device("h100"))
    state = sum(parts[one] for one in ("weights", "trained", "optimizer"))
    rest = sum(parts.values()) - state - parts["gathered"]
    memory = [state, parts["gathered"], rest, sum(parts.values()), sum(time.sent)]
    seconds = [time.overlapped_s + time.exposed_s, time.exchanged_s, time.products_s]
    cells = [name, kind, ranks, *(f"{one / GIB:,.1f}" for one in memory), *(f"{one:.3g}" for one in seconds)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for case in product(MODELS, KINDS, LAYOUTS):
        if set(args.words) <= set(case) and LAYOUTS[case[2]].model in (None, case[0]):
            print(row(*case), flush=True)


if __name__ == "__main__":
    main()
