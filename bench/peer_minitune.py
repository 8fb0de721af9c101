"""minitune beside the peers: the same rows, steps and JSON line as the scripts that run the others (`common.py` beside them).

Put this file next to those scripts and run it as they are run: `python peer_minitune.py lora_packed --dtype bfloat16 --compile`.
"""

import common as C

args = C.parser("minitune", ["lora", "lora_packed", "full", "full_packed", "qlora", "dpo", "kd"]).parse_args()
torch = C.setup_torch()

from minitune import checkpoint, models, steps
from minitune.algorithms.distillation import Teacher, distillation
from minitune.algorithms.objective import split_trainable
from minitune.algorithms.preference import preference as algorithms_preference
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.losses.distillation import ForwardKL
from minitune.losses.preference import Dpo
from minitune.models.compile import wrap
from minitune.optim.adamw import AdamW
from minitune.programs.allocator import bound_kernel_cache, keep_freed
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4
from minitune.types import Batch, Pairs

keep_freed()  # as a program run by `python -m minitune` does
bound_kernel_cache()
DTYPE = getattr(torch, args.dtype)
LORA = Lora(rank=C.RANK, alpha=float(C.ALPHA), targets=("*_proj.weight",))
OPTIMIZER = AdamW(lr=C.LR, weight_decay=0.01)


def opened(name):
    """(model, params) of one of the shared folders."""
    folder = C.MODELS / f"{name}-{args.dtype}"
    model = models.open(folder)
    params = checkpoint.load_params(folder, model.shapes(), DTYPE)
    if args.compile:
        model = model._replace(block_transform=wrap(print))
    if args.variant == "remat":
        model = model._replace(n_remat=model.config.n_layers)
    return model, params


def rows_to_batch(rows):
    """Padded on the right; labels of -100 are no targets."""
    padded = C.pad_batch(rows)
    return Batch(padded["input_ids"], padded["attention_mask"].to(torch.int32), padded["labels"] != C.IGNORE)


def timed(step, params, trainable, batches, shapes):
    """Run the steps and report them."""
    state = step.init(trainable)
    clock = C.Steps()
    for batch in batches:
        state, metrics = step.update(params, state, batch)
        clock.done(metrics["loss_nats"])
    C.report("minitune", args, clock, shapes, versions=C.git_like_versions("torch"))


def supervised():
    args.batch = args.batch or 4
    n = args.steps * args.batch
    packed = args.task.endswith("packed")
    rows = C.packed_rows(args.model, n, args.seq_len) if packed else C.load_rows("sft", args.model, n, args.seq_len, args.batch)
    name = "tiny32k" if args.task == "kd" else args.model
    model, params = opened(name)
    if args.task == "qlora":
        params = Quantization(NF4()).quantize(params)
    lora = None if args.task.startswith("full") else LORA
    if lora is None:
        params, trainable = split_trainable(params, ("*",))
        if args.dtype == "bfloat16":  # the peers train in bfloat16 whole
            trainable = {name: w.to(DTYPE) for name, w in trainable.items()}
    else:
        trainable = lora.init(params, 0)
    if args.task == "kd":
        teacher = Teacher(*opened(args.model))
        objective = distillation(model, lora, ForwardKL(ratio=0.5), teacher)
    else:
        objective = sft(model, lora)
    step = steps.train_step(objective, OPTIMIZER, micro_batch=args.batch, donate=True)
    batches = (rows_to_batch(rows[i * args.batch : (i + 1) * args.batch]) for i in range(args.steps))
    timed(step, params, trainable, batches, C.shapes_sft(rows, args.batch, args.steps))


def preference():
    args.batch = args.batch or 2
    rows = C.load_rows("dpo", args.model, args.steps * args.batch, args.seq_len, args.batch)
    model, params = opened(args.model)
    step = steps.train_step(
        algorithms_preference(model, LORA, Dpo(beta=C.BETA), {}), OPTIMIZER, micro_batch=args.batch, donate=True
    )

    def pairs(some):
        seqs = [
            {"input_ids": r["prompt_ids"] + r[k], "labels": [C.IGNORE] * len(r["prompt_ids"]) + r[k]}
            for k in ("chosen_ids", "rejected_ids")
            for r in some
        ]
        both = rows_to_batch(seqs)
        return Pairs(*(Batch(*(x.chunk(2)[half] for x in both)) for half in (0, 1)))

    batches = (pairs(rows[i * args.batch : (i + 1) * args.batch]) for i in range(args.steps))
    timed(step, params, LORA.init(params, 0), batches, C.shapes_dpo(rows, args.batch, args.steps))


preference() if args.task == "dpo" else supervised()
