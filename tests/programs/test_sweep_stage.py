"""A train stage with a sweep: its adapters are those of runs by themselves, the best goes on, a stopped run goes on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from minitune import checkpoint
from minitune.__main__ import main
from support.programs import LORA, TRAIN, rows_without_time, run, start

WATCH = 'evaluate = { data = "heldout", every = 6, batch_size = 8 }\n'
SWEPT = TRAIN.replace("steps = 4", "steps = 12").replace("lr = 0.05", "lr = 0.01, eps = 1e-4") + WATCH
POINTS = [
    {"optimizer.lr": 0.02, "lora.rank": 2, "seed": 0},
    {"optimizer.lr": 0.01, "lora.rank": 5, "seed": 1},
    {"optimizer.lr": 0.01, "lora.alpha": 8.0},
]
LISTED = "sweep = [" + ", ".join("{ " + ", ".join(f'"{k}" = {v}' for k, v in p.items()) + " }" for p in POINTS) + "]\n"


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(folder / "adapter_model.safetensors")


def rows_of(folder: Path, adapter: int | None = None) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if adapter is None or row["adapter"] == adapter]


def test_each_adapter_of_a_sweep_is_the_run_by_itself_and_the_best_goes_on(tiny: Path, tmp_path: Path) -> None:
    save = '[[stage]]\nop = "save"\nwhat = "deltas"\n'
    summary = run(tmp_path, tiny, LORA + SWEPT + LISTED + save, name="together")
    losses = {}
    for i, point in enumerate(POINTS):
        words = [f"{key.replace('optimizer', 'train.optimizer')}={value}" for key, value in point.items()]
        run(tmp_path, tiny, LORA + SWEPT + save, *words, name=f"alone{i}")
        alone, together = rows_of(tmp_path / f"alone{i}"), rows_of(tmp_path / "together", i)
        assert [row["step"] for row in together] == [row["step"] for row in alone] == list(range(1, 13))
        for name in ("loss", "lr", "grad_norm", "target_tokens", "skipped"):
            assert [row[name] for row in together] == pytest.approx([row[name] for row in alone], rel=1e-5)
        losses[i] = alone[-1]["heldout_loss"]
        assert together[-1]["heldout_loss"] == pytest.approx(losses[i], rel=1e-6)
        assert together[-1]["optimizer.lr"] == point["optimizer.lr"]
    best = min(losses, key=lambda i: losses[i])
    assert summary["train"]["best_adapter"] == best
    swept, wanted = (next((tmp_path / name).rglob("adapter_model.safetensors")).parent for name in ("together", f"alone{best}"))
    assert (swept / "adapter_config.json").read_text(encoding="utf-8") == (wanted / "adapter_config.json").read_text(
        encoding="utf-8"
    )
    alone = deltas(wanted)
    for name, x in deltas(swept).items():
        torch.testing.assert_close(x, alone[name], rtol=0.0, atol=1e-6)


def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not_been(tiny: Path, tmp_path: Path) -> None:
    grid = 'sweep = { "optimizer.lr" = [0.02, 0.01], seed = [3, 4] }\n'
    run(tmp_path, tiny, LORA + SWEPT + grid, name="straight")
    folder = tmp_path / "straight"
    shutil.copytree(folder, tmp_path / "killed" / "straight")
    states = checkpoint.list_states(tmp_path / "killed/straight/checkpoints/train")
    assert [path.name for path in states] == ["step-00000010", "step-00000012"]
    shutil.rmtree(states[-1])
    for name in ("summary.json", "records.json"):
        (tmp_path / "killed/straight" / name).unlink()
    (tmp_path / "killed/straight/records.json").write_text("{}", encoding="utf-8")
    assert main([str(tmp_path / "straight.toml"), f"out={tmp_path / 'killed'}"]) == 0
    assert rows_without_time(tmp_path / "killed/straight") == rows_without_time(folder)
    ends = [
        checkpoint.list_states(at / "checkpoints/train")[-1] / "state.safetensors"
        for at in (folder, tmp_path / "killed/straight")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()


REFUSED = {
    "unknown key": (SWEPT + 'sweep = { "optimizer.lrr" = [0.1] }\n', r"sweep with .*unknown field `lrr`"),
    "what can't be swept": (SWEPT + "sweep = { steps = [1, 2] }\n", "has 'steps' in its sweep, expected optimizer"),
    "no value": (SWEPT + 'sweep = { "lora.rank" = [] }\n', "has an empty sweep, expected at least one value"),
    "a rank of none": (SWEPT + 'sweep = { "lora.rank" = [0] }\n', r"sweep with .*'lora.rank': 0.*>= 1"),
    "twice": (SWEPT + "sweep = { seed = [1, 1] }\n", "the same point twice, expected each once"),
    "no held-out data": (TRAIN + "sweep = { seed = [1, 2] }\n", "a sweep without evaluate, expected one"),
    "a loss over pairs": (
        SWEPT.replace('data = "train"', 'data = "pairs"').replace('data = "heldout"', 'data = "pairs"')
        + 'loss = { kind = "dpo" }\nsweep = { seed = [1, 2] }\n',
        "has a sweep and loss 'dpo', expected cross_entropy",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sweep_that_does_not_fit_is_refused_before_anything_is_loaded(
    name: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    stages, message = REFUSED[name]
    assert start(tmp_path, tiny, LORA + stages, verb=("check",)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_sweep_needs_deltas_alone_and_fresh_ones_for_another_rank(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    grid = SWEPT + 'sweep = { "lora.rank" = [1, 2] }\n'
    assert start(tmp_path, tiny, '[[stage]]\nop = "full"\n' + grid, verb=("check",)) == 2
    assert "trains whole, expected deltas only" in capsys.readouterr().err
    first = TRAIN.replace('op = "train"', 'op = "train"\nname = "first"')
    assert start(tmp_path, tiny, LORA + first + grid) == 2
    assert "deltas are trained already, expected fresh ones" in capsys.readouterr().err
