"""Stages beyond one training run: checks that fold, early stopping, teachers, references, quantized bases, pipelines that die."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from minitune import checkpoint, models
from minitune.__main__ import main
from minitune.interop.peft.load import load_adapter
from minitune.io.results import MARKER
from minitune.losses.distillation import ForwardKL, JensenShannon, ReverseKL, SymmetricKL
from minitune.losses.registry import DistillationLoss, PairLoss
from minitune.models import Model
from minitune.models.families import llama
from minitune.quant import schemes
from minitune.quant.schemes import dequantize, quantize
from support.forked import Program
from support.independent import members
from support.models import random_params
from support.programs import LORA, NF4, TINY, TRAIN, evaluation, rows_without_time, run, start, toy, wait_for_step

REFUSED = {
    "no teacher": (LORA + TRAIN + 'loss = { kind = "forward_kl" }\n', "has no teacher, expected one exactly with a distillation"),
    "a teacher for nothing": (LORA + TRAIN + 'teacher = { path = "demo" }\n', "has a teacher, expected one exactly with"),
    "pairs of prose": (LORA + TRAIN + 'loss = { kind = "dpo" }\n', "format 'instruct', expected pairs"),
    "unpaired answers of pairs": (
        LORA + TRAIN.replace('"train"\nsteps', '"pairs"\nsteps') + 'loss = { kind = "kto" }\n',
        "format 'pairs', expected unpaired",
    ),
    "one answer at a time": (
        LORA
        + TRAIN.replace('"train"\nsteps', '"unpaired"\nsteps').replace("= 4\nsave", "= 1\nsave")
        + 'loss = { kind = "kto" }\n',
        "a batch of one answer, expected two",
    ),
    "base without deltas": (
        '[[stage]]\nop = "full"\n'
        + TRAIN.replace('"train"\nsteps', '"pairs"\nsteps')
        + 'loss = { kind = "dpo" }\nreference = "base"\n',
        "reference = 'base', but .* trains whole",
    ),
    "deltas of merged weights": (
        LORA
        + '[[stage]]\nop = "merge"\n'
        + LORA.replace("rank", 'name = "again"\nrank')
        + '[[stage]]\nop = "save"\nwhat = "deltas"\n',
        "is to save deltas of weights that a merge stage made, which no folder holds, expected those of a folder",
    ),
    "adapted and whole": (LORA + 'train = ["*q_proj.weight"]\n', "adapts .*q_proj.weight and trains it whole as well"),
    "nothing to merge": ('[[stage]]\nop = "merge"\n', "finds nothing trained to merge"),
    "quantize what trains": (LORA + NF4, "which trains or is quantized already, expected a plain weight; put a merge"),
    "quantize twice": (NF4 + NF4.replace("op", 'name = "again"\nop'), "is quantized already"),
    "train what is quantized": (NF4 + '[[stage]]\nop = "full"\n', "which is quantized, expected a plain weight"),
    "train beside deltas what is quantized": (
        NF4 + LORA.replace("*_proj", "*q_proj") + 'train = ["*up_proj.weight"]\n',
        "which is quantized, expected a plain weight; narrow the globs of what trains whole",
    ),
    "round what is frozen": (
        '[[stage]]\nop = "full"\nweights = ["*norm.weight"]\n[[stage]]\nop = "qat"\nscheme = { kind = "int8" }\n',
        "which does not train whole; put a full stage before it",
    ),
    "export what trains": (LORA + '[[stage]]\nop = "export"\nformat = "gguf"\n', "still training, expected none; put a merge"),
    "export dense": ('[[stage]]\nop = "export"\nformat = "compressed-tensors"\n', "no quantized weight to write as compressed"),
    "save codes": (NF4 + '[[stage]]\nop = "save"\nwhat = "params"\n', "quantized weights, expected dense ones; use an export"),
    "run folder without the save": (
        '[[stage]]\nop = "load"\nmodel = { path = "run/teacher" }\n',
        r"run/teacher' lies in the run folder, where no",
    ),
    "scheme that does not fit": (
        '[[stage]]\nop = "quantize"\nscheme = { kind = "int4", group = 128 }\n',
        r"int4.*group.*128|128.*group",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_stages_that_do_not_fit_are_refused_before_anything_is_loaded(
    name: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    stages, message = REFUSED[name]
    assert start(tmp_path, tiny, stages, verb=("check",)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error


def test_a_teacher_may_be_padded_to_another_size_but_not_have_other_tokens(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    same = {field: getattr(TINY, field) for field in TINY.__struct_fields__}
    wide = llama.Config(**{**same, "vocab_size": 1031})
    extras = checkpoint.FolderExtras(tiny / "model", [])
    model = Model(llama.FAMILY, wide)
    checkpoint.save_folder(tmp_path / "wide", random_params(wide), model, extras)
    kd = 'loss = {{ kind = "forward_kl" }}\nteacher = {{ path = "{}" }}\n'
    stages = LORA + TRAIN + kd.format(tmp_path / "wide")

    # another template, and so other bytes, but the same tokens
    config = tmp_path / "wide/tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("{%", "{# as taught #}{%", 1), "utf-8")
    assert start(tmp_path, tiny, stages, verb=("check",)) == 0
    cached = stages + "cached_top_k = 4\n"
    assert start(tmp_path, tiny, cached, verb=("check",)) == 2
    assert "a teacher of 1031 tokens, expected no more than the student's 1024" in capsys.readouterr().err

    # one token renamed
    spec = tmp_path / "wide/tokenizer_config.json"
    names = json.loads(spec.read_text(encoding="utf-8"))
    added = names["added_tokens_decoder"]
    added["3"]["content"] = "<|other|>"
    spec.write_text(json.dumps(names), encoding="utf-8")
    assert start(tmp_path, tiny, stages, verb=("check",)) == 2
    error = capsys.readouterr().err
    assert re.search(r"has a teacher .*wide\) .*expected the student's tokens under the same ids", error), error


def test_logits_that_only_one_of_the_models_has_are_left_out() -> None:
    student, teacher = torch.randn(3, 11), torch.randn(3, 14)
    targets = torch.tensor([0, 10, 4])
    for kind in (ForwardKL, ReverseKL, SymmetricKL, JensenShannon):
        loss = kind(ratio=0.5)
        expected = loss(student, targets, teacher[:, :11])
        assert torch.equal(loss(student, targets, teacher), expected)
        padded = torch.cat([student, torch.randn(3, 2)], dim=-1)
        assert torch.equal(loss(padded, targets, teacher[:, :11]), expected)


def test_the_logged_rate_is_the_one_that_was_applied(tiny: Path, tmp_path: Path) -> None:
    """A step that is skipped changes nothing, the place in the schedule included."""
    words = ("train.optimizer.lr=1e25", "train.schedule.warmup_steps=8", "train.steps=5")
    start(tmp_path, tiny, LORA + TRAIN, *words)
    rows = rows_without_time(tmp_path / "p")
    taken = 0
    for row in rows:
        assert row["lr"] == pytest.approx(1e25 * (taken + 1) / 8)
        taken += 1 - int(row["skipped"])
    assert 0 < taken < len(rows)


def test_early_stopping_keeps_the_best_step_also_when_it_is_resumed(tiny: Path, tmp_path: Path) -> None:
    rising = TRAIN.replace("steps = 4", "steps = 40").replace("0.05", "20.0")  # a rate that soon does harm
    watch = 'evaluate = { data = "heldout", every = 3, patience = 2, batch_size = 8 }\n'
    summary = run(tmp_path, tiny, LORA + rising + watch + evaluation("after"))
    rows = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    heldout = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    best = min(heldout, key=lambda step: heldout[step])
    assert set(heldout) == set(range(3, len(rows) + 1, 3))
    assert len(rows) < 40
    assert [step for step in heldout if step > best] == [best + 3, best + 6]
    assert summary["train"]["best_step"] == best
    assert summary["steps"] == best + 6
    assert summary["after"]["loss_nats"] == pytest.approx(heldout[best], rel=1e-5)
    # the same, killed after a step that evaluates nothing
    folder = tmp_path / "q/checkpoints/train"
    words = [str(tmp_path / "p.toml"), f"out={tmp_path}", "name=q", "train.save_every=1"]
    process = Program(words)
    wait_for_step(tmp_path / "q", 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main(words) == 0
    assert rows_without_time(tmp_path / "q") == rows_without_time(tmp_path / "p")
    kept, straight = (
        checkpoint.load_tensors(checkpoint.list_states(one / "best")[-1] / "state.safetensors")
        for one in (folder, tmp_path / "p/checkpoints/train")
    )
    assert all(torch.equal(kept[name], straight[name]) for name in straight)


def test_a_run_without_a_finite_heldout_loss_says_so(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    watch = 'evaluate = { data = "heldout", every = 2 }\n'
    diverging = TRAIN.replace("0.05", "1e30").replace("steps = 4", "steps = 2")
    assert start(tmp_path, tiny, LORA + diverging + watch) == 2
    assert "train had no finite held-out loss in 2 steps; lower the learning rate" in capsys.readouterr().err


def test_cached_and_live_references_and_teachers_train_alike(tiny: Path, tmp_path: Path) -> None:
    pairs = TRAIN.replace('"train"\nsteps', '"pairs"\nsteps') + 'loss = { kind = "dpo" }\n'
    losses = {}
    for reference in ("start", "base", "cached"):
        run(tmp_path, tiny, LORA + pairs + f'reference = "{reference}"\n', "train.optimizer.lr=0.5", name=reference)
        losses[reference] = [row["loss"] for row in rows_without_time(tmp_path / reference)]
    assert losses["start"][0] == pytest.approx(0.693147, abs=1e-6)
    assert all(abs(loss - 0.693147) > 1e-5 for loss in losses["start"][2:])
    assert losses["cached"] == pytest.approx(losses["start"], abs=5e-6)
    assert losses["base"] == pytest.approx(losses["start"], abs=5e-6)
    kd = TRAIN + 'loss = { kind = "reverse_kl", temperature = 2.0, ratio = 0.5 }\nteacher = { path = "demo" }\n'
    for top in ("", "cached_top_k = 1024\n"):
        run(tmp_path, tiny, LORA + kd + top, name=f"kd{len(top)}")
    live, cached = ([row["loss"] for row in rows_without_time(tmp_path / one)] for one in ("kd0", "kd20"))
    assert cached == pytest.approx(live, rel=1e-4)
    unpaired = TRAIN.replace('"train"\nsteps', '"unpaired"\nsteps') + 'loss = { kind = "kto" }\n'
    for reference in ("start", "cached"):
        run(tmp_path, tiny, LORA + unpaired + f'reference = "{reference}"\n', name=f"kto-{reference}")
    live, cached = ([row["loss"] for row in rows_without_time(tmp_path / f"kto-{one}")] for one in ("start", "cached"))
    assert cached == pytest.approx(live, abs=5e-6)


TEACHERS = tuple(one.__struct_config__.tag for one in members(DistillationLoss))
KINDS = (*(one.__struct_config__.tag for one in members(PairLoss)), "kto", *TEACHERS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_runs_as_a_program(kind: str, tiny: Path, tmp_path: Path) -> None:
    data = "unpaired" if kind == "kto" else "train" if kind in TEACHERS else "pairs"
    stages = LORA + TRAIN.replace('"train"\nsteps', f'"{data}"\nsteps') + f'loss = {{ kind = "{kind}" }}\n'
    teacher = 'teacher = { path = "demo" }\n' if data == "train" else ""
    summary = run(tmp_path, tiny, stages + teacher, "train.optimizer.lr=0.5")
    rows = rows_without_time(tmp_path / "p")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert summary["train"]["n_skipped"] == 0
    counted = {"unpaired": "answers", "pairs": "pairs", "train": "target_tokens"}[data]
    assert all(row[counted] > 0 for row in rows)
    assert len({row["loss"] for row in rows}) > 1
    if data == "pairs":
        assert all(row["reward_margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-4) for row in rows)


def test_a_compiled_generation_answers_as_an_eager_one(tiny: Path, tmp_path: Path) -> None:
    words = [*toy("generate", tiny, tmp_path), "generate.sampling={}"]
    done = Program(["generate", *words, "name=true", "generate.compiled=true"])  # apart: signatures' checks are not to be traced
    _, err = done.communicate()
    assert done.returncode == 0, err
    assert main(["generate", *words, "name=false", "generate.compiled=false"]) == 0
    one, two = ((tmp_path / name / "generate.jsonl").read_text(encoding="utf-8").splitlines() for name in ("true", "false"))
    assert one == two
    assert len(one) == 5


def test_a_distillation_killed_in_mid_run_continues_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    words = [*toy("kd", tiny, tmp_path, steps=12), "train-distilled.save_every=5"]
    for name in ("straight", "killed"):
        process = Program(["kd", *words, f"name={name}"])
        if name == "killed":
            wait_for_step(tmp_path / "killed", 8, process, "train-distilled")
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = Program(["kd", *words, f"name={name}"])
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "train-distilled: continuing from step 5 of 12" in out or "continuing from step 10 of 12" in out
    one, two = (checkpoint.load_tensors(tmp_path / name / "params/model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "killed")


def test_qlora_merges_onto_what_it_trained_on_and_says_both_errors(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    saves = '[[stage]]\nop = "save"\nwhat = "deltas"\n'
    saves += '[[stage]]\nop = "save"\nname = "trained"\nwhat = "merged"\npath = "run/trained"\ndtype = "float32"\n'
    saves += '[[stage]]\nop = "save"\nname = "stored"\nwhat = "merged"\npath = "run/stored"\nonto = "stored"\ndtype = "float32"\n'
    summary = run(tmp_path, tiny, NF4 + LORA + TRAIN + evaluation("after") + saves)
    output = capsys.readouterr().out
    assert "merged onto the dequantized weights" in output
    assert summary["trained"]["merge_error"] < 1e-6 < 0.01 < summary["stored"]["merge_error"]
    assert summary["quantize"]["bytes_after"] < summary["quantize"]["bytes_before"]
    model = models.open(tiny / "model")
    base = checkpoint.load_params(tiny / "model", model.shapes())
    rule, deltas, _ = load_adapter(tmp_path / "p/deltas", names=base)
    onto_trained, onto_stored = (checkpoint.load_params(tmp_path / "p" / one, model.shapes()) for one in ("trained", "stored"))
    for name in deltas:
        rounded = dequantize(quantize(base[name].float(), schemes.NF4()), torch.float32)
        torch.testing.assert_close(onto_trained[name], rule.merged_weight(rounded, deltas[name]), rtol=0, atol=1e-6)
        torch.testing.assert_close(onto_stored[name], rule.merged_weight(base[name], deltas[name]), rtol=0, atol=1e-6)
    # the merged model is the one that was evaluated
    reloaded = run(tmp_path, tiny, evaluation("after"), f"model.path={tmp_path / 'p/trained'}", name="again")
    assert reloaded["after"]["loss_nats"] == pytest.approx(summary["after"]["loss_nats"], rel=1e-5)
    # onto a dense base, it is merged when asked for
    adapter = f"model.deltas={tmp_path / 'p/deltas'}"
    for op in ('"merge"', '"save"\nwhat = "merged"\ndtype = "float32"'):
        assert start(tmp_path, tiny, f"[[stage]]\nop = {op}\n", adapter, name="dense") == 2
        output = capsys.readouterr().err
        assert re.search(r"but that was quantized by \{'scheme'.*nf4.* and is dense here, expected onto = 'stored'", output)
    run(tmp_path, tiny, f'[[stage]]\nop = {op}\nonto = "stored"\n', adapter, name="dense")
    dense = checkpoint.load_params(tmp_path / "dense/merged", model.shapes())
    assert all(torch.equal(dense[name], onto_stored[name]) for name in dense)
    # the adapter refuses another base, and another base's folder
    other = tmp_path / "other"
    shutil.copytree(tiny / "model", other, ignore=shutil.ignore_patterns(MARKER))
    weights = checkpoint.load_tensors(other / "model.safetensors")
    checkpoint.save_tensors(other / "model.safetensors", {name: w + 1e-3 for name, w in weights.items()})
    assert start(tmp_path, tiny, evaluation("after"), f"model.path={other}", adapter, name="refused") == 2
    assert re.search(r"\([0-9a-f]{12}\), whose weights are not those of .* \([0-9a-f]{12}\)", capsys.readouterr().err)


def test_weights_trained_under_rounding_are_converted_exactly(tiny: Path, tmp_path: Path) -> None:
    scheme = '[[stage]]\nop = "{}"\nscheme = {{ kind = "int4", group = 32 }}\n'
    stages = '[[stage]]\nop = "full"\n' + scheme.format("qat") + TRAIN + evaluation("rounded")
    stages += (
        '[[stage]]\nop = "merge"\ndtype = "float32"\n' + evaluation("dense") + scheme.format("quantize") + evaluation("int4")
    )
    summary = run(tmp_path, tiny, stages)
    assert summary["int4"]["loss_nats"] == pytest.approx(summary["rounded"]["loss_nats"], rel=1e-6)
    assert summary["dense"]["loss_nats"] != pytest.approx(summary["rounded"]["loss_nats"], rel=1e-5)
    assert summary["int4"]["model_bytes"] < summary["dense"]["model_bytes"]


def test_a_pipeline_killed_in_any_stage_goes_on_there_and_ends_like_the_straight_one(tiny: Path, tmp_path: Path) -> None:
    words = [*toy("pipeline", tiny, tmp_path, steps=20), "sft.save_every=3", "dpo.save_every=3"]
    straight = Program(["pipeline", *words, "name=straight"])
    _, err = straight.communicate()
    assert straight.returncode == 0, err
    for stage in ("sft", "dpo"):
        process = Program(["pipeline", *words, "name=killed"])
        wait_for_step(tmp_path / "killed", 11, process, stage)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = Program(["pipeline", *words, "name=killed"])
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert re.search(r"dpo: continuing from step \d+ of 20", out)
    assert "sft 1/20" not in out
    assert "tuned: loss" not in out  # that was measured before the run died
    killed, wanted = (
        {**json.loads((tmp_path / one / "summary.json").read_text(encoding="utf-8"))} for one in ("killed", "straight")
    )
    for name in ("base", "tuned", "preferred", "int4"):
        assert killed[name] | {"time_s": 0} == wanted[name] | {"time_s": 0}
    assert rows_without_time(tmp_path / "killed") == rows_without_time(tmp_path / "straight")
    for part in ("params/model.safetensors", "compressed-tensors/model.safetensors"):
        one, two = (checkpoint.load_tensors(tmp_path / run / part) for run in ("killed", "straight"))
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one)
    # a table, or where COLUMNS says that there is no room for it a line for each figure
    shown = out.partition("\nkilled")[2]
    for name in ("base", "sft", "tuned", "dpo", "preferred", "quantize", "int4"):
        assert re.search(rf"^(│ )?{name}\b", shown, re.MULTILINE), shown


def test_what_trains_starts_from_the_exact_weights_whatever_computes(tiny: Path, tmp_path: Path) -> None:
    stages = '[[stage]]\nop = "full"\n[[stage]]\nop = "save"\nwhat = "params"\n'
    run(tmp_path, tiny, stages, "model.dtype=bfloat16")
    model = models.open(tiny / "model")
    saved, wanted = (checkpoint.load_params(path, model.shapes()) for path in (tmp_path / "p/params", tiny / "model"))
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(w, w.bfloat16().float()) for w in wanted.values())


def test_bfloat16_weights_train_by_stochastic_rounding(tiny: Path, tmp_path: Path) -> None:
    save = '[[stage]]\nop = "save"\nwhat = "params"\ndtype = "float32"\n'
    stages = (
        '[[stage]]\nop = "full"\ndtype = "{}"\n' + TRAIN.replace("lr = 0.05", "lr = 1e-6") + save
    )  # far below a bfloat16's step
    model = models.open(tiny / "model")
    old = checkpoint.load_params(tiny / "model", model.shapes())
    for dtype in ("bfloat16", "float32"):
        run(tmp_path, tiny, stages, f"full.dtype={dtype}", name=dtype)
    state = checkpoint.load_tensors(checkpoint.list_states(tmp_path / "bfloat16/checkpoints/train")[-1] / "state.safetensors")
    assert {x.dtype for key, x in state.items() if key.startswith("trainable.")} == {torch.bfloat16}
    rounded, exact = (checkpoint.load_params(tmp_path / dtype / "params", model.shapes()) for dtype in ("bfloat16", "float32"))
    start = {name: w.bfloat16().float() for name, w in old.items()}
    moved = torch.cat([(rounded[name] != start[name]).flatten() for name in old if name.endswith("_proj.weight")])
    assert 0.01 < float(moved.float().mean()) < 0.2  # some weights took a whole step of their dtype, most none
    assert all((exact[name] != old[name]).any() for name in old if name.endswith("_proj.weight"))
