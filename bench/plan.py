"""Plans beside runs: the memory and the time that `minitune plan --measure` says, and those of a run of the same program.

    python bench/plan.py FOLDER [WORD ...]     all rows, or those whose words are all there, e.g. `lora small`, `fsdp`
    python bench/plan.py FOLDER --toy          two rows of one step: does it run?

Two models: the demo (1.8M parameters) and a Llama of 24M, written to FOLDER. LoRA of rank 8 on all linear weights, every
weight, LoRA over NF4, DPO with LoRA, distillation from a model of the same size; blocks computed again or not. Every plan and
every run is a process of its own. Memory is the peak of the process, as a run reports it. Time is that of the processor, on one
thread: a longer run less a shorter one, over the steps that it has more. The plan's clock is the processor's too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

SHAPE = """family = "llama"
n_layers = 8
n_heads = 8
n_kv_heads = 4
d_model = 512
d_head = 64
d_ff = 1408
vocab_size = 1024
norm_eps = 1e-5
rope_theta = 10000.0
tie_embeddings = true
max_positions = 2048
"""
KINDS, MODELS = ("lora", "full", "qlora", "dpo", "kd"), ("demo", "small")
FEW, MORE = 3, {"demo": 33, "small": 9}  # steps of the runs: short steps need more of them
HEADER = ("training", "model", "blocks again", "planned, MiB", "measured, MiB", "ratio", "planned, s", "measured, s", "ratio")
LORA = '[[stage]]\nop = "lora"\nrank = 8\nalpha = 16.0\ntargets = ["*_proj.weight"]\n\n'
PLANS = "dp", "fsdp"  # of two ranks
TRAIN = """[[stage]]
op = "train"
data = "train"
steps = {steps}
batch_size = 8
remat = {again}
optimizer = {{ kind = "adamw", lr = 1e-4 }}
"""


def program(folder: Path, kind: str, model: str, again: str, steps: int) -> str:
    """Text of the program of one row."""
    path = "demo" if model == "demo" else str(folder / "small/params")
    data = "demo/orders-pairs.jsonl" if kind == "dpo" else "demo/orders-train.jsonl"
    form = "pairs" if kind == "dpo" else "instruct"
    head = f'name = "plan-{kind}-{model}-{again}"\nout = "{folder}/runs"\nresume = false\n\n[model]\npath = "{path}"\n\n'
    table = f'[data.train]\npath = "{data}"\nformat = "{form}"\nseq_len = 256\n\n'
    quantize = '[[stage]]\nop = "quantize"\nscheme = { kind = "nf4" }\nweights = ["*_proj.weight"]\n\n'
    adapt = {"full": '[[stage]]\nop = "full"\n\n', "kd": '[[stage]]\nop = "full"\n\n', "qlora": quantize + LORA}.get(kind, LORA)
    loss = {
        "dpo": 'loss = { kind = "dpo" }\n',
        "kd": f'loss = {{ kind = "forward_kl" }}\nteacher = {{ path = "{path}" }}\n',
    }.get(kind, "")
    return head + table + adapt + TRAIN.format(steps=steps, again=again) + loss


def run(words: list[str]) -> tuple[str, float]:
    """(standard output, seconds of the processor) of a command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench/plan.py: {' '.join(words)} ended with {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def written(folder: Path, text: str) -> str:
    """Path of a program of this text."""
    file = folder / "program.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def plan_of(file: str, plan: str = "") -> dict[str, Any]:
    """Memory [bytes] and seconds of a step as planned; of a worker, whose clock is the processor's."""
    from minitune.planning.mesh import mesh_under
    from minitune.programs import program as programs
    from minitune.programs.allocator import bound_kernel_cache, keep_freed
    from minitune.programs.data_facts import data_facts
    from minitune.programs.plan import HERE, PlanTarget, first_state, planned
    from minitune.programs.plan_rows import as_taken, with_longest
    from minitune.programs.plan_time import measured, measured_machine, planned_time

    keep_freed()  # as a run does
    bound_kernel_cache()
    source = programs.load(Path(file))
    first = first_state(source)
    tables = data_facts(first, source.stage, source.seed).tables
    target = PlanTarget(mesh=mesh_under({"data": 2}, plan)) if plan else HERE
    (one,) = planned(source, with_longest(first, tables), target)
    if plan:
        return {"bytes": one.peak_bytes}
    dtype = one.step.params["model.embed_tokens.weight"].dtype
    here = measured_machine(one.step.device, dtype, time.process_time)
    timed = as_taken(one, tables["train"])
    here = measured(timed, tables["train"], here, time.process_time)
    return {"bytes": one.peak_bytes, "step_s": planned_time(timed, here).step.expected_s}


def row(folder: Path, kind: str, model: str, again: str, few: int, more: int) -> str:
    """One row of the table."""
    text, _ = run([__file__, "--plan", written(folder, program(folder, kind, model, again, more))])
    plan = json.loads(text.splitlines()[-1])
    times = {}
    for steps in (few, more):
        file = written(folder, program(folder, kind, model, again, steps))
        times[steps] = run(["-m", "minitune", file])[1]
    record = json.loads((folder / f"runs/plan-{kind}-{model}-{again}/summary.json").read_text(encoding="utf-8"))
    step_s = (times[more] - times[few]) / (more - few)
    peak, n_bytes = record["peak_mem_bytes"] / 2**20, plan["bytes"] / 2**20
    cells = [kind, model, "all" if again == "true" else "none", f"{n_bytes:,.0f}", f"{peak:,.0f}", f"{peak / n_bytes:.2f}"]
    cells += [f"{plan['step_s']:.3g}", f"{step_s:.3g}", f"{step_s / plan['step_s']:.2f}"]
    return f"| {' | '.join(cells)} |"


def row_of_ranks(folder: Path, kind: str, plan: str, steps: int) -> str:
    """One row of the table for the demo on two ranks."""
    file = written(folder, program(folder, kind, "demo", "false", steps))
    text, _ = run([__file__, "--plan", file, plan])
    run(["-m", "minitune", file, "--ranks", "2", f"plan={plan}"])
    record = json.loads((folder / f"runs/plan-{kind}-demo-false/summary.json").read_text(encoding="utf-8"))
    peak, n_bytes = record["peak_mem_bytes"] / 2**20, json.loads(text.splitlines()[-1])["bytes"] / 2**20
    cells = [f"{kind}, 2 ranks, {plan}", "demo", "none", f"{n_bytes:,.0f}", f"{peak:,.0f}", f"{peak / n_bytes:.2f}", "", "", ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--toy", action="store_true", help="two rows of few steps: does it run?")
    parser.add_argument("--plan", action="store_true", help="of a worker: the plan of the program FOLDER")
    args = parser.parse_args()
    if args.plan:
        print(json.dumps(plan_of(str(args.folder), *args.words)))
        return
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.toy and not (folder / "small/params").is_dir():
        (folder / "small.toml").write_text(SHAPE, encoding="utf-8")
        made = f'name = "small"\nout = "{folder}"\nresume = false\n[model]\nconfig = "{folder}/small.toml"\ntokenizer = "demo"\n'
        run(["-m", "minitune", written(folder, made + '[[stage]]\nop = "save"\nwhat = "params"\n')])
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for kind, model, again in product(KINDS, MODELS, ("false", "true")):
        words = {kind, model, "all" if again == "true" else "none"}
        if not set(args.words) <= words or (args.toy and (model != "demo" or again == "true" or kind not in KINDS[:2])):
            continue
        print(row(folder, kind, model, again, *((1, 2) if args.toy else (FEW, MORE[model]))), flush=True)
    for kind, plan in product(KINDS[:2], () if args.toy else PLANS):
        if set(args.words) <= {kind, plan, "demo", "none"}:
            print(row_of_ranks(folder, kind, plan, MORE["demo"]), flush=True)


if __name__ == "__main__":
    main()
