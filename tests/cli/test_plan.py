"""The plan of a training stage: the floor of its memory beside what a step really takes, and its floating-point operations."""

import importlib.util
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from minitune import models, tree
from minitune.__main__ import main
from minitune.algorithms.objective import apply_trainable
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.inference.generate import greedy
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.experts import Experts
from minitune.models.families import gemma2, llama, mixtral
from minitune.models.weights import head_name
from minitune.nn import head
from minitune.nn.attention import blockwise
from minitune.optim import adamw, eight_bit, rounding, transforms
from minitune.optim.adamw import AdamW
from minitune.optim.sgd import SGD
from minitune.planning.flops import flops_per_token
from minitune.planning.inference import answer_memory, evaluation_memory
from minitune.planning.memory import peak_memory
from minitune.planning.step_spec import StepSpec
from minitune.programs import plan_fit, program
from minitune.programs.plan import planned
from minitune.programs.stages.quantize import Quantize
from minitune.programs.stages.train import Train
from minitune.programs.state import PipelineState
from minitune.types import Batch, Delta
from support.allocation import AllocatedBytes
from support.models import random_params
from support.paths import ROOT
from support.programs import LORA, NF4, TRAIN, evaluation, start

_spec = importlib.util.spec_from_file_location("memory", ROOT / "bench/memory.py")
assert _spec is not None
assert _spec.loader is not None
memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory)

SIZES = {"n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "d_model": 90, "d_head": 14, "d_ff": 262, "vocab_size": 1031}
LLAMA = Model(llama.FAMILY, llama.Config(**SIZES))
BROAD = Model(llama.FAMILY, llama.Config(**{**SIZES, "vocab_size": 7919}))
TIED = Model(llama.FAMILY, llama.Config(**{**SIZES, "vocab_size": 7919}, tie_embeddings=True))
WIDE_HEADS = {**SIZES, "n_heads": 2, "n_kv_heads": 1, "d_head": 46}  # as wide beside d_model as they are in the real ones
GEMMA = Model(gemma2.FAMILY, gemma2.Config(**WIDE_HEADS, tie_embeddings=True, window=200))
MIXTRAL = Model(mixtral.FAMILY, mixtral.Config(**SIZES, experts=Experts(n_experts=5, n_active=2, d_ff=98, names="mixtral")))
ROUNDED = (AdamW(lr=1e-3), rounding.RoundStochastically(0))


def built(kind: str, model: Model, dtype: torch.dtype, n_rows: int, n_tokens: int, **how: Any) -> tuple[StepSpec, Any]:
    """(a step as its costs are counted, the same step as a function to run)."""
    params = {name: w.to(dtype) / 20 for name, w in random_params(model.config).items()}
    how |= {"targets": ("*_proj.weight", "*.w?.weight")} if model is MIXTRAL else {}
    return memory.step_and_run(kind, model, params, n_rows, n_tokens, **how)


AGAIN = LLAMA._replace(n_remat=3)
CASES = {  # kind, model, dtype, rows, tokens a row, logits that the head holds at a time, and what else is not as usual
    "lora in bfloat16": ("lora", LLAMA, torch.bfloat16, 5, 83, 2**14, {}),
    "lora, blocks again": ("lora", LLAMA._replace(n_remat=3), torch.float32, 3, 131, 2**14, {}),
    "lora, two blocks again": ("lora", LLAMA._replace(n_remat=2), torch.bfloat16, 2, 211, 2**14, {}),
    "lora, fullest at the head": ("lora", LLAMA, torch.float32, 3, 131, 2**22, {}),
    "lora with dropout": ("lora", LLAMA, torch.float32, 3, 131, 2**14, {"dropout": 0.1}),
    "lora with dropout, blocks again": ("lora", AGAIN, torch.bfloat16, 3, 131, 2**14, {"dropout": 0.1}),
    "dpo with dropout": ("dpo", LLAMA, torch.float32, 2, 131, 2**14, {"dropout": 0.1}),
    "full": ("full", LLAMA, torch.float32, 3, 131, 2**14, {}),
    "full, blocks again": ("full", LLAMA._replace(n_remat=3), torch.bfloat16, 3, 131, 2**14, {}),
    "full, micro-batches": ("full", LLAMA, torch.float32, 3, 131, 2**14, {"micro_batch": 1}),
    "full in bfloat16, micro-batches": (
        *("full", LLAMA, torch.bfloat16, 3, 131, 2**14),
        {"trained": torch.bfloat16, "optimizers": ROUNDED, "micro_batch": 1},
    ),
    "full, a large head": ("full", BROAD, torch.float32, 3, 61, 2**14, {}),
    "full, a large tied head": ("full", TIED, torch.bfloat16, 3, 61, 2**14, {}),
    "full, rounded": ("full", LLAMA, torch.bfloat16, 3, 131, 2**14, {"trained": torch.bfloat16, "optimizers": ROUNDED}),
    "full, 8 bits": ("full", LLAMA, torch.bfloat16, 3, 131, 2**14, {"optimizers": (eight_bit.AdamW8bit(lr=1e-3),)}),
    "full, momentum": ("full", LLAMA, torch.float32, 3, 131, 2**14, {"optimizers": (SGD(lr=1e-3, momentum=0.9),)}),
    "qlora": ("qlora", LLAMA, torch.float32, 3, 131, 2**14, {}),
    "qlora in bfloat16, blocks again": ("qlora", LLAMA._replace(n_remat=3), torch.bfloat16, 3, 131, 2**14, {}),
    "dpo": ("dpo", LLAMA, torch.float32, 2, 131, 2**14, {}),
    "dpo in bfloat16, blocks again": ("dpo", LLAMA._replace(n_remat=3), torch.bfloat16, 2, 131, 2**14, {}),
    "gemma": ("lora", GEMMA, torch.float32, 3, 131, 2**14, {}),
    "gemma in bfloat16": ("full", GEMMA, torch.bfloat16, 3, 131, 2**14, {}),
    "experts": ("lora", MIXTRAL, torch.float32, 3, 131, 2**14, {}),
    "experts in bfloat16, full": ("full", MIXTRAL, torch.bfloat16, 3, 131, 2**14, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_no_more_memory_than_its_floor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks of the head and of the optimizer, and attention's blocks, are made small, as they are beside a real model."""
    *case, chunk, how = CASES[name]
    monkeypatch.setattr(head, "HEAD_CHUNK", chunk)
    monkeypatch.setattr(head, "HEAD_ROWS", 1)
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    monkeypatch.setattr(adamw, "FUSED_ELEMENTS", {"cpu": 2**14})
    monkeypatch.setattr(transforms, "SLICE_ELEMENTS", {"cpu": 2**13})
    step, run = built(*case, **how)
    assert 0.95 <= memory.peak_bytes(step, run) / sum(peak_memory(step).values()) <= 1.05


def test_the_bench_of_memory_fills_its_table_at_toy_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["memory.py", "--toy", "lora"])
    memory.main()
    _, header, _, *table = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(header.strip("|").split("|")) == 6
    assert [row[:3] for row in cells] == [
        ["lora", dtype, again] for dtype in ("float32", "bfloat16") for again in ("none", "all")
    ]
    assert all(0.9 <= float(row[5]) <= 1.1 for row in cells)


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("model", [LLAMA, GEMMA, MIXTRAL], ids=["llama", "gemma", "mixtral"])
def test_the_matrix_products_of_a_step_are_those_that_torch_counts(model: Model, whole: bool) -> None:
    """To the last one, whatever trains, blocks computed again or not. Attention is one operator to torch, and not counted."""
    params, batch = random_params(model.config), memory.rows(model.config.vocab_size, 2, 37)
    n_unlabelled = 2  # each document's first token, which the head never sees
    for globs in ("*", "*.1.self_attn.k_proj.weight *.2.*norm.weight", "*.0.*_proj.weight *.w2.*"):
        names = [name for name in params if any(fnmatchcase(name, glob) for glob in globs.split())]
        rule = Lora(3, 6.0, tuple(n for n in names if params[n].ndim == 2 and "model.layers" in n))
        trainable = {name: params[name] for name in names} if whole else rule.init(params, 0)
        head = head_name(model.config)
        beyond = n_unlabelled * 2 * params[head].numel() * (3 if head in trainable else 2)
        for n_remat in (0, 2):
            again = model._replace(n_remat=n_remat)
            objective = sft(again, None if whole else rule)
            with FlopCounterMode(display=False) as counted:
                value_and_grad(lambda leaves, f=objective: f(leaves, params, batch), has_aux=True)(trainable)
            wanted = batch.tokens.numel() * flops_per_token(again, trainable, 0.0) - beyond
            assert counted.get_total_flops() == pytest.approx(wanted, rel=1e-9)


def test_inputs_that_wait_in_the_hosts_memory_do_not_grow_with_depth() -> None:
    def activations(n_layers: int, offloaded: bool) -> int:
        model = Model(LLAMA.family, msgspec.structs.replace(LLAMA.config, n_layers=n_layers), n_remat=n_layers)
        step, _ = memory.step_and_run("lora", model, random_params(model.config), 2, 128)
        return peak_memory(step._replace(offloaded=offloaded))["activations"]

    assert activations(9, True) == activations(5, True)
    assert activations(9, False) - activations(5, False) == 4 * (2 * 128 * LLAMA.config.d_model * 4)


def test_attention_is_counted_over_the_keys_that_are_seen() -> None:
    """Half of all pairs for causal rows, those of the window where there is one; back twice as many as forward."""
    c, n_tokens = LLAMA.config, 128
    pairs = sdpa_flop_count(*[(1, c.n_heads, n_tokens, c.d_head)] * 3) / n_tokens

    def beside_products(model: Model, trainable: Any) -> float:
        return flops_per_token(model, trainable, n_tokens) - flops_per_token(model, trainable, 0.0)

    every, one = random_params(c), "model.layers.1.self_attn.v_proj.weight"
    assert beside_products(LLAMA, {}) == pytest.approx(3 * pairs / 2)
    assert beside_products(LLAMA, every) == pytest.approx(3 * 3 * pairs / 2)
    assert beside_products(LLAMA._replace(n_remat=2), every) == pytest.approx((3 * 3 + 2) * pairs / 2)
    assert beside_products(LLAMA, {one: every[one]}) == pytest.approx((1 + 2 * 3) * pairs / 2)
    assert beside_products(LLAMA, {"lm_head.weight": every["lm_head.weight"]}) == pytest.approx(3 * pairs / 2)
    narrow = Model(gemma2.FAMILY, gemma2.Config(**SIZES, window=16))  # layers 0 and 2
    assert beside_products(narrow, {}) == pytest.approx((2 * 16 / 64 + 1) * pairs / 2)


def test_the_flops_of_8b_are_those_of_the_budget() -> None:
    """6 N a token for every weight; 4 N for LoRA less the gradients of the first layer's input, which nobody needs."""
    model = models.open_config(ROOT / "configs/models/llama-3.1-8b.toml")
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    n, d = 8_030_261_248 - 128256 * 4096 - 65 * 4096, 4096  # without the embedding and the norms
    assert flops_per_token(model, params, 2048.0) == 6 * n + 6 * 32 * d * 2048
    deltas = {name: Delta(params[name][:16], params[name][:, :16]) for name in params if name.endswith("_proj.weight")}
    adapters = 6 * sum(delta.a.numel() + delta.b.numel() for delta in deltas.values())
    beyond = 2 * (d + 2 * 1024) * d + 3 * 2 * 16 * d
    assert flops_per_token(model, deltas, 100.0) == 4 * n + adapters - beyond + 6 * 32 * d * 100


def plan_of(capsys: pytest.CaptureFixture[str], *args: Any, **how: Any) -> str:
    assert start(*args, **how, verb=("plan",)) == 0
    return capsys.readouterr().out


def test_a_program_is_planned_stage_by_stage_and_says_whether_it_fits(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dpo = TRAIN.replace('data = "train"', 'name = "dpo"\ndata = "pairs"\nloss = { kind = "dpo" }')
    printed = plan_of(capsys, tmp_path, tiny, LORA + TRAIN + dpo)
    assert re.search(
        r"train: 4 x 256 tokens at a time need [\d.]+ MiB, \d+% of the [\d,]+ MiB of this machine's cpu: fits", printed
    )
    assert "dpo: 8 x 256 tokens at a time need" in printed
    assert not list(tmp_path.glob("runs/*"))
    sft, preferred = planned(program.load(tmp_path / "p.toml"))
    assert preferred.parts["second model"] == tree.n_bytes(preferred.step.trainable)
    assert preferred.flops_per_token > sft.flops_per_token

    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: sft.process_bytes + sft.n_bytes // 2)
    printed = plan_of(capsys, tmp_path, tiny, LORA + TRAIN)
    assert "does not fit\n  with train.micro_batch_size=1: " in printed
    assert printed.endswith(", fits\n# in the stage train\nmicro_batch_size = 1\n")
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: 1000)
    printed = plan_of(capsys, tmp_path, tiny, '[[stage]]\nop = "full"\n' + TRAIN)
    assert "and train.optimizer.kind=adamw8bit" in printed
    assert printed.endswith("  or a smaller model, or a lora stage in place of a full one\n")


def test_what_a_plan_advises_is_what_check_accepts(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kto = TRAIN.replace('data = "train"', 'data = "unpaired"\nloss = { kind = "kto" }')
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: 1000)
    text = plan_of(capsys, tmp_path, tiny, LORA + kto)
    (word, _) = re.findall(r"with (train.micro_batch_size=\d+)", text)
    assert word == "train.micro_batch_size=2"
    assert start(tmp_path, tiny, LORA + kto, word, verb=("check",)) == 0


def test_an_evaluation_takes_the_memory_that_is_planned_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "HEAD_CHUNK", 2**14)
    step, _ = built("lora", LLAMA, torch.float32, 2, 83)
    objective = sft(LLAMA, step.lora, CrossEntropy())
    ids = torch.randint(1, 1031, (9, 83))
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    with AllocatedBytes() as measured, torch.no_grad():
        objective(step.trainable, step.params, batch)
    parts = evaluation_memory(step, 9, 83)
    made = parts["transient"] + parts["activations"]
    assert 0.75 <= measured.peak / made <= 1.25
    assert {name: parts[name] for name in ("weights", "trained", "optimizer")} == {
        name: peak_memory(step)[name] for name in ("weights", "trained", "optimizer")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_take_the_memory_that_is_planned_for_them(dtype: torch.dtype) -> None:
    step, _ = built("lora", LLAMA, dtype, 9, 83)
    params = apply_trainable(step.params, step.trainable, step.lora)
    prompts = torch.randint(1, 1031, (9, 83)).tolist()
    with AllocatedBytes() as measured:
        greedy(LLAMA, params, prompts, max_new_tokens=70, stop_ids=[])
    parts = answer_memory(step, 70)
    assert parts["cache"] == 3 * 2 * 9 * 2 * 256 * 14 * dtype.itemsize
    made = parts["cache"] + parts["transient"] + parts["activations"]
    assert 0.75 <= measured.peak / made <= 1.25
    assert parts["weights"] == peak_memory(step)["weights"]
    assert parts["optimizer"] == 0


def test_evaluations_and_generations_with_rows_of_their_own_are_planned(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those without are as large as a step, at most."""
    generate = '[[stage]]\nop = "generate"\ndata = "heldout"\nmax_new_tokens = 900\n'
    asked = evaluation("after").replace("limit = 2", "batch_size = 40")
    text = plan_of(capsys, tmp_path, tiny, evaluation("before") + LORA + TRAIN + asked + generate + "batch_size = 64\n")
    assert "after: 40 x 256 tokens at a time need" in text
    assert "generate: 64 x 256 tokens at a time need" in text
    assert "before" not in text
    train, after, generated = planned(program.load(tmp_path / "p.toml"))
    assert generated.parts["cache"] == 2 * 2 * 64 * 1 * 1280 * 16 * 4  # of 256 and 900 tokens, rounded up to 128
    assert after.parts["trained"] == generated.parts["trained"] == train.parts["trained"]
    assert min(after.n_bytes, generated.n_bytes) > train.n_bytes

    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: generated.process_bytes + generated.n_bytes // 2)
    text = plan_of(capsys, tmp_path, tiny, generate + "batch_size = 64\n")
    assert "does not fit\n  with generate.batch_size=1: " in text
    assert text.endswith(", fits\n# in the stage generate\nbatch_size = 1\n")


def test_a_plan_counts_an_evaluation_that_is_larger_than_the_step(tiny: Path, tmp_path: Path) -> None:
    def n_bytes(evaluate: str) -> int:
        stages = LORA + TRAIN.replace("batch_size = 4", "batch_size = 1") + evaluate
        assert start(tmp_path, tiny, stages, verb=("check",)) == 0
        (one,) = planned(program.load(tmp_path / "p.toml"))
        return one.n_bytes

    plain = n_bytes("")
    assert n_bytes('evaluate = { data = "heldout", every = 2 }\n') == plain
    assert n_bytes('evaluate = { data = "heldout", every = 2, batch_size = 64 }\n') > 1.5 * plain


def test_the_time_to_the_end_has_the_evaluations_in_it(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each takes the forward of all held-out tokens: half of a step's time with adapters, a third in full training."""
    evaluate = 'evaluate = { data = "heldout", every = 3, at_start = true }\n'
    for stages, share in ((LORA, 1 / 2), ('[[stage]]\nop = "full"\n', 1 / 3)):
        asked = stages + TRAIN.replace("steps = 4", "steps = 7") + evaluate
        assert start(tmp_path, tiny, asked, verb=("check",)) == 0
        said = re.search(r"heldout has \d+ samples, ([\d,]+) tokens", capsys.readouterr().out)
        assert said is not None
        n_tokens = int(said[1].replace(",", ""))
        assert main(["plan", str(tmp_path / "p.toml"), "--device", "h100", "--json"]) == 0
        time = json.loads(capsys.readouterr().out)["result"]["stages"]["train"]["time"]
        assert time["evaluations"]["n"] == 4  # before the first step, after 3, 6 and 7
        assert time["evaluations"]["s"] == pytest.approx(share * time["step_expected_s"] * n_tokens / (4 * 256))
        assert time["end_s"] == pytest.approx(7 * time["step_expected_s"] + 4 * time["evaluations"]["s"])
        assert main(["plan", str(tmp_path / "p.toml"), "--device", "h100"]) == 0
        assert re.search(r"7 steps and 4 evaluations of \S+ s take about 1 s, what comes before", capsys.readouterr().out)


def test_what_is_read_before_the_first_step_are_the_files_of_its_models(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the time of the device's disk, where that is known; a model that is made at random is not read."""
    assert start(tmp_path, tiny, LORA + TRAIN, verb=("check",)) == 0
    n_bytes = sum(file.stat().st_size for file in (tiny / "model").glob("*.safetensors"))
    h100 = (ROOT / "configs/devices/h100.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(f"disk_bytes_per_s = 2e3\n{h100}", encoding="utf-8")
    in_time = rf"in {n_bytes / 2e3:.3g} s at the rate of the disk"
    for device, how in (("h100", "in how long is not known: plan --measure finds out"), (tmp_path / "mine.toml", in_time)):
        capsys.readouterr()
        assert main(["plan", str(tmp_path / "p.toml"), "--device", str(device)]) == 0
        said = capsys.readouterr().out
        assert f"GiB of weights are read, {how}; tokenizing, quantizing and compiling are not counted" in said
        assert main(["plan", str(tmp_path / "p.toml"), "--device", str(device), "--json"]) == 0
        read = json.loads(capsys.readouterr().out)["result"]["before_first_step"]
        assert read == {"weight_bytes": n_bytes, "s": None if device == "h100" else n_bytes / 2e3}
    model = 'model={ config = "configs/models/llama-125m.toml", tokenizer = "demo" }'
    assert main(["plan", str(tmp_path / "p.toml"), model, "--device", "h100"]) == 0
    assert "before the first step" not in capsys.readouterr().out.replace("what comes before the first step left out", "")


def test_weights_that_are_quantized_first_are_never_loaded_whole(tiny: Path, tmp_path: Path) -> None:
    loaded: list[Any] = []
    run_quantize = Quantize.run

    def spy(stage: Quantize, state: PipelineState) -> PipelineState:
        loaded.append(dict(state.loaded.params))
        return run_quantize(stage, state)

    with mock.patch.object(Quantize, "run", spy):
        assert start(tmp_path, tiny, NF4) == 0
        assert start(tmp_path, tiny, evaluation("before") + NF4, name="q") == 0
    first, later = loaded
    waiting = {name for name, w in first.items() if w.is_meta}
    assert waiting == {name for name in first if name.endswith("_proj.weight")}
    assert not any(w.is_meta for w in later.values())


def test_what_a_run_loads_is_what_its_plan_counts(tiny: Path, tmp_path: Path) -> None:
    """The step of a real run, compared with that of the plan."""
    loaded_by: dict[str, Any] = {}

    def spy(stage: Train, state: PipelineState, *_: Any) -> Any:
        loaded_by[stage.label] = state.loaded
        raise InputError("seen")

    stages = NF4 + LORA.replace("targets", 'train = ["*norm.weight"]\ndora = true\ntargets') + TRAIN
    with mock.patch.object(Train, "run", spy):
        assert start(tmp_path, tiny, stages, "model.dtype=bfloat16") == 2
    (one,) = planned(program.load(tmp_path / "p.toml", ["model.dtype=bfloat16"]))

    def leaf_shapes(leaves: Any) -> dict[str, Any]:
        return {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in tree.items(leaves)}

    assert leaf_shapes(one.step.trainable) == leaf_shapes(loaded_by["train"].trainable)
    assert leaf_shapes(one.step.params) == leaf_shapes(loaded_by["train"].params)


def test_a_plan_for_ranks_takes_the_mesh_and_the_plan_that_are_asked_for_or_those_of_the_program(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, tiny, LORA + TRAIN, verb=("check",)) == 0
    model = 'model={ config = "configs/models/llama-125m.toml", tokenizer = "demo" }'
    capsys.readouterr()

    def planned_for(*words: str) -> str:
        assert main(["plan", str(tmp_path / "p.toml"), model, "--device", "h100", *words]) == 0
        return capsys.readouterr().out

    alone = planned_for()
    assert "each rank sends" not in alone
    asked = planned_for("--mesh", "data=2,context=4", "--plan", "cp")
    assert re.search(r"each rank sends \S+ GiB of weights .* GiB of activations in \S+ s, for which the products wait", asked)
    lacks = '; to run so, put at the top of the program:\nplan = "cp"\nmesh = { data = 2, context = 4 }\n'
    assert f"8 ranks, plan cp, mesh data=2,context=4{lacks}" in asked
    assert asked.replace(lacks, "\n") == planned_for("plan=cp", "mesh={data=2,context=4}")
    table = 'plan={d_ff="shelf"}'
    of_table = planned_for(table, "mesh={data=2,shelf=3}")
    assert "GiB of weights" in of_table
    assert "activations in" not in of_table
    assert "6 ranks, plan of the program's own, mesh data=2,shelf=3\n" in of_table
    lacks = "; to run so, put at the top of the program:\nmesh = { data = 2, shelf = 3 }\n"
    assert of_table == planned_for(table, "--mesh", "data=2,shelf=3").replace(lacks, "\n")
    of_eight = planned_for("--n", "8")
    assert of_eight == planned_for("--mesh", "data=8", "--plan", "fsdp")
    assert '8 ranks, plan fsdp, mesh data=8; to run so, put at the top of the program:\nplan = "fsdp"\ntrain: ' in of_eight
    of_ranks = json.loads(planned_for("--n", "8", "--json"))["result"]["ranks"]
    assert of_ranks["lines"][0].startswith("8 ranks, plan fsdp, mesh data=8")
    assert of_ranks["toml"] == ['plan = "fsdp"']
    # the order of axes is part of a mesh
    turned = planned_for("plan=hsdp", "mesh={replica=2,data=4}", "--mesh", "data=4,replica=2")
    assert "mesh data=4,replica=2; to run so, put at the top of the program:\nmesh = { data = 4, replica = 2 }\n" in turned
    assert "8 ranks, plan dp, mesh data=8\ntrain: " in planned_for("--n", "8", "--plan", "dp")
    assert planned_for("plan=cp", "mesh={data=2,context=4}", "--n", "1") == alone

    for words, message in (
        (("--mesh", "data=2,shelf=3"), "the mesh has the axis 'shelf', along which the plan cuts nothing"),
        (("--mesh", "data=2,context=5"), "the axis context has 5 ranks, among which 12 heads of queries are dealt out"),
        (("--plan", "zero"), "there is no plan 'zero'"),
        (("--n", "0"), "plan: --n is 0, expected one device or more"),
    ):
        assert main(["plan", str(tmp_path / "p.toml"), model, *words]) == 2
        assert message in capsys.readouterr().err


def test_the_plan_of_one_process_does_not_import_what_several_need(tmp_path: Path, tiny: Path) -> None:
    assert start(tmp_path, tiny, LORA + TRAIN, verb=("check",)) == 0
    code = f"import sys; from minitune.__main__ import main; main(['plan', {str(tmp_path / 'p.toml')!r}, '--device', 'h100'])"
    code += "; print('minitune.sharding.placements' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.endswith("False\n"), done.stdout


def test_a_program_that_trains_nothing_is_refused(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert start(tmp_path, tiny, NF4, verb=("plan",)) == 2
    assert "p.toml has no train stage, and no eval or generate stage with a batch_size, expected one" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == (
        "minitune: plan without a program, expected plan PROGRAM [--device h100 --n 8] [--measure] [KEY=VALUE ...]\n"
    )
