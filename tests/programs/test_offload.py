"""Programs whose frozen blocks lie on the disk: the same runs, what is refused, and the memory that it takes."""

import re
from pathlib import Path

import pytest
import torch

from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.checkpoint.hf_weights import weight_slices
from minitune.checkpoint.tensors import save_tensors
from minitune.errors import InputError
from minitune.io.paths import locate
from minitune.models import Model
from minitune.models.families import llama
from minitune.programs.loading import ModelSource, load
from minitune.sharding.offloaded import OffloadedTensor
from support.models import random_params
from support.programs import LORA, NF4, TRAIN, evaluation, rows_without_time, run, start, weights
from support.scripts import run_script

MERGE = '[[stage]]\nop = "merge"\n'
DISK = "model.offload=disk"
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed returns to the system at once


@pytest.mark.parametrize(("before", "remat"), [("", "false"), (NF4, '"1 MiB"')])
def test_a_run_from_the_disk_is_the_run_without(tiny: Path, tmp_path: Path, before: str, remat: str) -> None:
    stages = before + LORA + TRAIN + f"compiled = false\nremat = {remat}\n" + MERGE + evaluation("after")
    summaries = [run(tmp_path, tiny, stages, *words, name=name) for name, words in (("here", ()), ("away", (DISK,)))]
    here, away = (tmp_path / name for name in ("here", "away"))
    assert rows_without_time(away) == rows_without_time(here)
    states = [weights(folder) for folder in (here, away)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    losses = [{key: value for key, value in one["after"].items() if "loss" in key} for one in summaries]
    assert losses[0] == losses[1] != {}
    assert "frozen blocks are read from the disk" in (away / "log.txt").read_text(encoding="utf-8")
    # it may change when a run is continued, which then has nothing left to do
    assert start(tmp_path, tiny, stages, DISK, name="here") == 0
    assert len(rows_without_time(here)) == len(rows_without_time(away))


def test_dense_blocks_and_codes_are_never_read_as_a_whole(tiny: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(tiny / "model"), device="cpu", dtype="bfloat16", offload="disk")
    loaded, plain = load(source, tmp_path, 0), load(ModelSource(path=source.path, device="cpu", dtype="bfloat16"), tmp_path, 0)
    away = {name for name, w in loaded.params.items() if isinstance(w, OffloadedTensor)}
    assert away == {name for name, w in plain.params.items() if ".layers." in name and w.ndim > 1}
    for name, w in plain.params.items():
        assert loaded.params[name].dtype == torch.bfloat16
        assert torch.equal(loaded.params[name].clone(), w)
    run(tmp_path, tiny, NF4 + LORA + TRAIN, DISK)
    assert (tmp_path / "p/checkpoints/quantize/quantized.safetensors").is_file()


def test_the_process_is_smaller_by_the_frozen_blocks(tmp_path: Path) -> None:
    """Anonymous memory, for the pages of a file are the system's to take back."""
    config = llama.Config(n_layers=16, n_heads=4, n_kv_heads=4, d_model=256, d_head=64, d_ff=1024, vocab_size=1024)
    weights = random_params(config, dtype=torch.bfloat16)
    save_folder(tmp_path / "model", weights, Model(llama.FAMILY, config), FolderExtras(locate("demo"), []))
    here, away = (int(run_script("offload_memory", str(tmp_path / "model"), place, **PAGES)) for place in ("device", "disk"))
    of_blocks = 4 * sum(w.numel() for name, w in weights.items() if ".layers." in name and w.ndim > 1)
    # all blocks but those that are there at a time
    assert here > of_blocks
    assert here - away > (1 - 4 / config.n_layers) * of_blocks


@pytest.mark.parametrize(
    ("stages", "words", "message"),
    [
        (
            '[[stage]]\nop = "full"\n' + TRAIN,
            (DISK,),
            "full is to train model.layers.0.*, which .model. offload keeps",
        ),
        (LORA + 'train = ["*.up_proj.weight"]\n' + TRAIN, ("model.offload=host",), "expected a frozen weight"),
        (LORA + TRAIN, (DISK, "plan=fsdp"), 'offload is given with plan = .fsdp., .*expected plan = "dp"'),
        (LORA + TRAIN, (DISK, "model.config={tiny}/shape.toml"), "given with config, whose weights are drawn"),
        (LORA + TRAIN, ("model.offload=dsik",), "disk"),
    ],
)
def test_what_does_not_go_together_is_refused(
    stages: str, words: tuple[str, ...], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, tiny, stages, *(word.format(tiny=tiny) for word in words)) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_a_folder_are_refused_as_weights_to_read_at_each_use(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    save_tensors(tmp_path / "model.safetensors", {name: torch.ones(3, 2).to(dtype)})
    with pytest.raises(InputError, match=f"holds {name} as codes or within another tensor, expected a tensor of its own"):
        weight_slices(tmp_path, {name})
