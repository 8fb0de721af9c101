"""Programs on several processes equal those on one, end together, and go on from each other's states."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitune.__main__ import main
from minitune.checkpoint import list_states, load_tensors
from minitune.checkpoint.state import state_step
from support.paths import ROOT, TESTS
from support.program_ranks import end_of, run_on_ranks
from support.programs import COMMAND, STAGES_HEAD, rows_without_time, spawn, wait_for_step
from support.rank_launchers import joined
from support.ranks import Ranks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}

# every way of training whose rows are dealt: batches that do not divide, more ranks than rows, dropout, a held-out loss
METHODS = """
[[stage]]
op = "lora"
rank = 2
alpha = 4.0
dropout = 0.25
targets = ["*_proj.weight"]
[[stage]]
op = "train"
name = "sft"
data = "train"
steps = 4
batch_size = 5
micro_batch_size = 2
save_every = 3
optimizer = { kind = "adamw", lr = 0.02 }
evaluate = { data = "heldout", every = 2, batch_size = 3, at_start = true }
[[stage]]
op = "train"
name = "one-row"
data = "train"
steps = 2
batch_size = 1
optimizer = { kind = "sgd", lr = 0.01 }
[[stage]]
op = "train"
name = "dpo"
data = "pairs"
steps = 2
batch_size = 3
loss = { kind = "dpo", beta = 0.1 }
reference = "cached"
optimizer = { kind = "adamw", lr = 0.01 }
[[stage]]
op = "train"
name = "kto"
data = "unpaired"
steps = 2
batch_size = 6
micro_batch_size = 2
loss = { kind = "kto" }
optimizer = { kind = "adamw", lr = 0.01 }
[[stage]]
op = "train"
name = "many"
data = "train"
steps = 2
batch_size = 3
micro_batch_size = 1
optimizer = { kind = "adamw", lr = 0.01 }
evaluate = { data = "heldout", every = 2, batch_size = 40 }
sweep = { "optimizer.lr" = [0.01, 0.02] }
[[stage]]
op = "save"
what = "deltas"
[[stage]]
op = "eval"
data = "heldout"
limit = 2
max_new_tokens = 2
[[stage]]
op = "merge"
[[stage]]
op = "full"
weights = ["*.mlp.*"]
[[stage]]
op = "train"
name = "kd"
data = "train"
steps = 2
batch_size = 4
loss = { kind = "forward_kl", temperature = 2.0 }
teacher = { path = "TINY/model", dtype = "float32" }
optimizer = { kind = "adamw8bit", lr = 0.01 }
clip_norm = 0.1
"""
PLAIN = """
[[stage]]
op = "lora"
rank = 2
alpha = 4.0
targets = ["*_proj.weight"]
[[stage]]
op = "train"
data = "train"
steps = STEPS
batch_size = 4
save_every = SAVES
optimizer = { kind = "adamw", lr = 0.01 }
[[stage]]
op = "save"
what = "deltas"
"""


SHARED = """
[[stage]]
op = "quantize"
scheme = { kind = "nf4" }
weights = ["*.mlp.*_proj.weight"]
[[stage]]
op = "lora"
rank = 2
alpha = 4.0
dora = true
dropout = 0.25
targets = ["*_proj.weight"]
train = ["model.norm.weight"]
[[stage]]
op = "train"
name = "lora-train"
data = "train"
steps = 3
batch_size = 3
save_every = 2
optimizer = { kind = "adamw", lr = 0.02 }
evaluate = { data = "heldout", every = 2, batch_size = 8 }
[[stage]]
op = "eval"
data = "heldout"
limit = 2
max_new_tokens = 2
[[stage]]
op = "merge"
[[stage]]
op = "full"
[[stage]]
op = "train"
name = "full-train"
data = "train"
steps = 3
batch_size = 3
save_every = 1
save_in_background = true
optimizer = { kind = "adamw", lr = 0.002 }
evaluate = { data = "heldout", every = 2, batch_size = 8 }
[[stage]]
op = "generate"
prompt = "Three globes to Salzburg."
max_new_tokens = 3
[[stage]]
op = "merge"
name = "merge-full"
dtype = "float32"
[[stage]]
op = "save"
what = "params"
"""


WRITTEN = """
[[stage]]
op = "save"
what = "merged"
[[stage]]
op = "save"
name = "again"
what = "deltas"
[[stage]]
op = "merge"
dtype = "bfloat16"
[[stage]]
op = "full"
[[stage]]
op = "save"
name = "wide"
what = "params"
dtype = "float32"
path = "run/wide"
[[stage]]
op = "merge"
name = "merge-full"
[[stage]]
op = "quantize"
scheme = { kind = "int4", group = 32 }
[[stage]]
op = "export"
format = "compressed-tensors"
[[stage]]
op = "load"
model = { path = "run/merged", dtype = "float32" }
[[stage]]
op = "eval"
data = "heldout"
limit = 2
max_new_tokens = 2
[[stage]]
op = "quantize"
name = "nf4"
scheme = { kind = "nf4" }
[[stage]]
op = "export"
name = "bitsandbytes"
format = "bitsandbytes"
[[stage]]
op = "export"
name = "gguf"
format = "gguf"
types = { default = "Q8_0" }
"""


def plain(steps: int, save_every: int = 1000) -> str:
    return PLAIN.replace("STEPS", str(steps)).replace("SAVES", str(save_every))


def written(folder: Path, tiny: Path, name: str, stages: str) -> str:
    """Path of a program file made of these stages."""
    text = STAGES_HEAD.format(name=name, tiny=tiny) + stages.replace("TINY", str(tiny))
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return str(folder / f"{name}.toml")


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """End of a command whose processes have a thread each."""
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "adapter_model.safetensors")


def files_of(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"step-\d+", "step", name) for name in names}


def assert_same_runs(one: Path, other: Path, *, same_files: bool = True) -> None:
    """Rows of two runs differ by the rounding of sums alone, and both left the same files."""
    rows, others = rows_without_time(one), rows_without_time(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, different in zip(rows, others, strict=True):
        assert row.pop("stage") == different.pop("stage")
        assert row == pytest.approx(different, rel=2e-4, abs=1e-6)
        # before the rounding of a step has moved the weights
        first = {name: value for name, value in row.items() if name in ("loss", "heldout_loss") and row["step"] <= 1}
        assert first == pytest.approx({name: different[name] for name in first}, rel=1e-6, abs=1e-7)
    if same_files:
        assert files_of(one) == files_of(other)


def test_every_method_on_three_processes_equals_one(ranks: Ranks, tmp_path: Path, tiny: Path):
    assert main([written(tmp_path, tiny, "one", METHODS), f"out={tmp_path}"]) == 0
    done = run_on_ranks(ranks, 3, [written(tmp_path, tiny, "three", METHODS), f"out={tmp_path}", "--json"], tmp_path)
    assert "3 ranks, plan dp, mesh data=3 (gloo)" in done.err
    assert_same_runs(tmp_path / "one", tmp_path / "three")

    deltas, others = tensors_of(tmp_path / "one/deltas"), tensors_of(tmp_path / "three/deltas")
    assert deltas.keys() == others.keys()
    for name, leaf in deltas.items():
        # Adam divides by the size of a gradient, which makes the rounding of one near zero large
        torch.testing.assert_close(leaf, others[name], rtol=1e-3, atol=1e-4)
    result = json.loads(done.out)["result"]
    summary = json.loads((tmp_path / "three/summary.json").read_text("utf-8"))
    assert result["summary"].keys() == summary.keys()
    assert summary["eval"]["n_prompts"] == 2


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Folder of the run that one process makes of SHARED."""
    out = tmp_path_factory.mktemp("one")
    assert main([written(out, tiny, "one", SHARED), f"out={out}"]) == 0
    return out / "one"


@pytest.mark.parametrize("how", [("plan=fsdp",), ("plan=cp", "mesh={data=1,context=2}")], ids=str)
def test_ranks_that_share_the_model_equal_one_process(how: tuple[str, ...], ranks: Ranks, one: Path, tmp_path: Path, tiny: Path):
    """The states of a plan are saved in parts; here they are read again by the stage that keeps the best one."""
    run_on_ranks(ranks, 2, [written(tmp_path, tiny, "two", SHARED), f"out={tmp_path}", *how], tmp_path)
    assert_same_runs(one, tmp_path / "two", same_files=False)
    assert len(list((tmp_path / "two/checkpoints/full-train").glob("step-*/state-0000?-of-00002.safetensors"))) == 4
    params, others = (load_tensors(run / "params/model.safetensors") for run in (one, tmp_path / "two"))
    assert params.keys() == others.keys()
    for name, w in params.items():
        torch.testing.assert_close(w, others[name], rtol=1e-3, atol=1e-4)


def test_what_ranks_write_of_weights_in_parts_is_what_one_process_writes(ranks: Ranks, tmp_path: Path, tiny: Path):
    """Nothing trains here, so every file is the same to the bit: folders, adapters and exports."""
    assert main([written(tmp_path, tiny, "trained", plain(2)), f"out={tmp_path}"]) == 0
    deltas = f"model.deltas={tmp_path / 'trained/deltas'}"
    assert main([written(tmp_path, tiny, "one", WRITTEN), f"out={tmp_path}", deltas]) == 0
    run_on_ranks(ranks, 2, [written(tmp_path, tiny, "two", WRITTEN), f"out={tmp_path}", deltas, "plan=fsdp"], tmp_path)
    for name in ("merged", "deltas", "wide", "compressed-tensors", "bitsandbytes"):
        files = sorted(path.name for path in (tmp_path / "one" / name).iterdir() if not path.name.startswith("."))
        assert "model.safetensors" in files or "adapter_model.safetensors" in files
        for file in files:
            if file != "README.md":
                both = [(tmp_path / run / name / file).read_bytes() for run in ("one", "two")]
                assert both[0] == both[1], f"{name}/{file}"
    assert (tmp_path / "one/model.gguf").read_bytes() == (tmp_path / "two/model.gguf").read_bytes()
    records = [json.loads((tmp_path / run / "records.json").read_text("utf-8")) for run in ("one", "two")]
    assert records[0].keys() == records[1].keys()
    assert records[0]["merge"]["merge_error"] == records[1]["merge"]["merge_error"] > 0
    assert records[0]["eval"]["loss_nats"] == pytest.approx(records[1]["eval"]["loss_nats"], rel=1e-6)


def test_a_signal_ends_all_processes_with_a_saved_state_that_one_process_continues(tmp_path: Path, tiny: Path):
    stages = plain(40)
    assert main([written(tmp_path, tiny, "straight", stages), f"out={tmp_path}"]) == 0
    program = written(tmp_path, tiny, "stopped", stages)
    process = spawn([program, f"out={tmp_path}", "--ranks", "2"], env=ENVIRONMENT)
    wait_for_step(tmp_path / "stopped", 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.count("stopped at step") == 1
    assert main([program, f"out={tmp_path}"]) == 0
    assert "continuing from step" in (tmp_path / "stopped/log.txt").read_text("utf-8")
    assert_same_runs(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.soak
def test_a_run_goes_from_two_ranks_to_three_to_one_through_signals_and_a_kill(tmp_path: Path, tiny: Path):
    """Under a plan: stopped in LoRA on two ranks, in full training on three, killed on two, ended by one process."""
    longer = ["lora-train.steps=12", "full-train.steps=12", "lora-train.save_in_background=true"]
    assert main([written(tmp_path, tiny, "straight", SHARED), f"out={tmp_path}", *longer]) == 0
    program = written(tmp_path, tiny, "moved", SHARED)
    for n_ranks, stage, step, victim in ((2, "lora-train", 5, None), (3, "full-train", 3, None), (2, "full-train", 8, 1)):
        words = [program, f"out={tmp_path}", *longer, "plan=fsdp", "--ranks", str(n_ranks)]
        process = spawn(words, env=ENVIRONMENT)
        wait_for_step(tmp_path / "moved", step, process, stage)
        if victim is None:
            process.send_signal(signal.SIGTERM)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
            os.kill(int(children[victim]), signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == 128 + (signal.SIGTERM if victim is None else signal.SIGKILL), err
    assert main([program, f"out={tmp_path}", *longer]) == 0
    assert_same_runs(tmp_path / "straight", tmp_path / "moved", same_files=False)


def test_a_process_that_is_killed_takes_the_others_down_and_is_named(tmp_path: Path, tiny: Path):
    program = written(tmp_path, tiny, "killed", plain(1000, save_every=2))
    process = spawn([program, f"out={tmp_path}", "--ranks", "2"], env=ENVIRONMENT)
    wait_for_step(tmp_path / "killed", 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = process.communicate()  # and not after the day that a collective may wait
    assert process.returncode == 128 + signal.SIGKILL, err
    assert err.count("minitune: rank 1 of 2 was killed by SIGKILL") == 1
    assert "Traceback" not in err
    assert "fault of minitune" not in err
    saved = state_step(list_states(tmp_path / "killed/checkpoints/train")[-1])
    assert main([program, f"out={tmp_path}", f"train.steps={saved + 1}"]) == 0
    assert f"continuing from step {saved} of {saved + 1}" in (tmp_path / "killed/log.txt").read_text("utf-8")


def test_a_mistake_is_one_sentence_of_the_first_process(tmp_path: Path, tiny: Path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/mine.txt").write_text("not a run", encoding="utf-8")
    done = finished([*COMMAND, written(tmp_path, tiny, "p", plain(4)), f"out={tmp_path}", "--ranks", "2", "--json"])
    assert done.returncode == 2, done.stderr
    (told,) = (line for line in done.stderr.splitlines() if not line.startswith("program: "))
    assert "holds no manifest.json, expected a run folder" in told
    assert json.loads(done.stdout) == {"exit_code": 2, "error": told}


def test_private_training_is_refused_by_each_process(ranks: Ranks, tmp_path: Path, tiny: Path):
    private = "privacy = { max_norm = 1.0, noise = 1.0, delta = 1e-5 }\n"
    words = [written(tmp_path, tiny, "p", plain(4).replace("batch_size = 4\n", f"batch_size = 4\n{private}")), f"out={tmp_path}"]
    for code, _, err in ranks.run(2, end_of, words, tmp_path):
        assert code == 2, err
        assert err.count("has privacy and the run 2 processes, expected one") == len(err.strip().splitlines()) == 1


def test_torchrun_starts_a_run_unchanged(tmp_path: Path, tiny: Path):
    program = written(tmp_path, tiny, "p", plain(3))
    how = ["--standalone", "--nproc-per-node", "2", "-m", "minitune", program, f"out={tmp_path}"]
    command = [sys.executable, "-m", "torch.distributed.run", *how]
    done = finished(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("holds this run") == 1
    assert main([written(tmp_path, tiny, "one", plain(3)), f"out={tmp_path}"]) == 0
    assert_same_runs(tmp_path / "one", tmp_path / "p")


def test_processes_find_one_another_as_each_launcher_says(ranks: Ranks):
    # of the five ports in a row none may be taken: those above the range that systems hand out
    port = 61000 + os.getpid() % 4000
    for rank, results in enumerate(ranks.run(2, joined, port)):
        for name in ("torchrun", "azureml-mpi", "slurm", "existing"):
            assert results.pop(name) == {
                "ranks": [rank, 2, rank, 1, None],
                "sum": [1.0, 2.0],
                "n": 6,
                "any": [False, True, True],
                "first": [[[7.0] * 3] * 2, False, []],
                "text": "from the first: \u00e9",
                "dealt": [[2 * i + rank, True] for i in range(2)] + [[4, rank == 0]],
                "none": [],
            }, name
        assert all(results.values()), results
