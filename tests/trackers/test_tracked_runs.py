"""A run as its trackers have it: histograms, artifacts, one pass of a W&B sweep, and a run that was killed."""

import json
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest
import torch
import yaml

from minitune import models, tree
from minitune.__main__ import main
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.programs.stages.histograms import N_BINS, histogram, mean_gradients
from minitune.types import Batch
from support.paths import ROOT
from support.programs import LORA, TRAIN, run, toy
from support.wandb_files import history, wandb_records

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
SAVE = '[[stage]]\nop = "save"\nwhat = "deltas"\n'


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        (tmp_path / "w").mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / "w"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "w"


def finished(folder: Path) -> list:
    for _ in range(200):  # the service of wandb closes the file after it has said that the run is finished
        records = list(wandb_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        sleep(0.05)
    raise AssertionError("the offline file has no exit record after 10 s")


@pytest.mark.usefixtures("offline")
def test_histograms_and_artifacts_reach_the_trackers(tmp_path: Path, tiny: Path, offline: Path) -> None:
    log = '[log]\nwandb = { artifacts = ["deltas"] }\nmlflow = { artifacts = ["deltas", "checkpoints"] }\n'
    log += 'watch = { every = 2, log = "all" }\n'
    run(tmp_path, tiny, LORA + TRAIN + SAVE + log)
    records = finished(offline)
    rows = {row["_step"]: row for row in history(records)}
    name = "model.layers.0.self_attn.q_proj.weight.a"
    for step in (2, 4):
        for kind in ("gradients", "parameters"):
            drawn = {key for key in rows[step] if key.startswith(f"{kind}/{name}")}
            assert drawn, (step, sorted(rows[step])[:5])
    assert not any(key.startswith("gradients/") for step in (1, 3) for key in rows[step])
    assert [rows[step]["current_epoch"] for step in (1, 4)] == [0, 0]

    artifacts = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    (artifact,) = [each for each in artifacts if each.type == "model"]
    assert (artifact.name, list(artifact.aliases)) == ("p-deltas", ["latest"])
    metadata = json.loads(artifact.metadata)
    assert metadata["seed"] == 0
    assert metadata["train/last_loss"] > 0
    assert set(metadata["sha256"]) >= {"adapter_model.safetensors"}

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("minitune").experiment_id])
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"p-deltas", "p-deltas.json", "p-checkpoints", "program.toml", "summary.json"} <= files
    place = Path(client.download_artifacts(found.info.run_id, "p-deltas", str(tmp_path)))
    ours = tmp_path / "p/deltas/adapter_model.safetensors"
    assert (place / ours.name).read_bytes() == ours.read_bytes()


def test_gradients_in_parts_are_those_of_the_whole_batch() -> None:
    model, params = models.load("demo", dtype=torch.float32)
    lora = Lora(rank=3, alpha=5.0, targets=("*.q_proj.weight",))
    deltas = {name: delta._replace(b=0.01 * torch.randn(delta.b.shape)) for name, delta in lora.init(params, 0).items()}
    tokens = torch.randint(0, 1024, (5, 17))
    batch = Batch(tokens, torch.ones_like(tokens), torch.rand(5, 17) < 0.6)
    objective = sft(model, lora)
    flat = [leaf.requires_grad_() for leaf in tree.leaves(deltas)]
    mean, _ = objective(deltas, params, batch)
    wanted = torch.autograd.grad(mean.total / mean.weight, flat)
    got = mean_gradients(objective, tree.map(torch.Tensor.detach, deltas), params, batch, n_rows=2)
    for a, b in zip(tree.leaves(got), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_a_histogram_counts_every_finite_value_once() -> None:
    x = torch.randn(37, 11)
    x[3, 4], x[5, 6] = torch.nan, torch.inf
    counts, edges = histogram(x)
    finite = x[torch.isfinite(x)]
    assert (len(counts), len(edges), sum(counts)) == (N_BINS, N_BINS + 1, 37 * 11 - 2)
    assert (edges[0], edges[-1]) == (pytest.approx(float(finite.min())), pytest.approx(float(finite.max())))
    for low, high, n in zip(edges[5:20], edges[6:21], counts[5:20], strict=True):
        assert n == float(((finite >= low) & (finite < high)).sum())
    assert sum(histogram(torch.full((4,), 2.0)).counts) == 4
    assert sum(histogram(torch.full((4,), torch.nan)).counts) == 0


def drawn(sweep: dict) -> Iterator[dict]:
    """Parameters as a server of W&B might choose them: the ends of each range."""
    for end in ("min", "max"):
        yield {name: {"value": rule.get(end) or rule["values"][0]} for name, rule in sweep["parameters"].items()}


def test_the_sweep_runs_what_its_agent_would_run(
    tmp_path: Path, tiny: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load((ROOT / "programs/wandb-sweep.yaml").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    for i, args in enumerate(drawn(sweep)):
        monkeypatch.setenv("WANDB_RUN_ID", f"run{i}")
        arguments = utils.create_sweep_command_args({"args": args})["args_no_hyphens"]
        command = utils.create_sweep_command(list(sweep["command"]))
        expanded = {"${args_no_hyphens}": arguments, "${program}": [sweep["program"]], "${env}": [], "${interpreter}": []}
        words = [word for part in command for word in expanded.get(part, [part])]
        assert words[:2] == ["-m", "minitune"]
        small = [word for word in toy("lora", tiny, tmp_path) if not word.startswith("out=")]
        assert main([*words[2:], *small]) == 0
        summary = json.loads((tmp_path / f"runs/run{i}/lora/summary.json").read_text(encoding="utf-8"))
        assert sweep["metric"]["name"] == "after/loss_nats"
        assert summary["after"]["loss_nats"] > 0
        assert (tmp_path / f"runs/run{i}/lora/wandb-id").read_text(encoding="utf-8") == f"run{i}"
