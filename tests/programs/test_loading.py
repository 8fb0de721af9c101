"""What a model is when it has been loaded."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitune.models.open import open_config
from minitune.programs.loading import ModelSource, load
from minitune.programs.sharding import Sharding
from minitune.sharding.parts import is_sharded, local_parts
from minitune.sharding.plans import named_plan
from support.fake_ranks import as_rank
from support.models import family_of
from support.paths import ROOT

SHAPE = """family = "llama"
n_layers = 2
n_heads = 2
n_kv_heads = 1
d_model = 24
d_head = 12
d_ff = 36
vocab_size = 1024
norm_eps = 1e-5
rope_theta = 10000.0
tie_embeddings = true
max_positions = 64
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_random_weights_too_a_rank_keeps_its_part_alone(dtype: str, tmp_path: Path) -> None:
    """Those of a folder are mapped from the disk; these would take the memory of a whole model on every rank."""
    shape = tmp_path / "shape.toml"
    shape.write_text(SHAPE, encoding="utf-8")
    whole = open_config(shape).init(3)
    source = ModelSource(config=str(shape), tokenizer=str(ROOT / "minitune/demo/model"), device="cpu", dtype=dtype)
    for rank in range(2):
        with as_rank(rank, {"data": 2}) as mesh:
            loaded = load(source, tmp_path, 3, sharding=Sharding(named_plan("fsdp"), mesh))
            for name, w in whole.items():
                stored, used = loaded.stored[name], loaded.params[name]
                part = w if w.ndim == 1 else w.chunk(2, stored.placements[0].dim)[rank]
                for own, expected in ((stored, part), (used, part.to(getattr(torch, dtype)))):
                    assert is_sharded(own) == (w.ndim > 1)
                    assert local_parts(own).equal(expected)
                    assert local_parts(own).untyped_storage().nbytes() == expected.nbytes


def mapped_bytes(file: Path) -> int:
    """Bytes of this process's memory that are pages of a file."""
    n_bytes, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if not line.split()[0].endswith(":"):
            is_of_file = line.endswith(str(file))
        elif is_of_file and line.startswith("Rss:"):
            n_bytes += 1024 * int(line.split()[1])
    return n_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what of a file is in memory")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_were_copied_leave_no_pages_of_their_file(dtype: str, is_shared: bool, tiny: Path, tmp_path: Path) -> None:
    shape, folder = tmp_path / "shape.toml", tmp_path / "model"
    shape.write_text(SHAPE.replace("d_ff = 36", "d_ff = 36000"), encoding="utf-8")
    model = open_config(shape)
    shutil.copytree(tiny / "model", folder)
    (folder / "config.json").write_text(json.dumps(family_of(model.config).to_hf(model.config)), encoding="utf-8")
    (folder / ".minitune-files.json").unlink()
    params = {name: w.bfloat16() for name, w in model.init(3).items()}
    file = folder / "model.safetensors"
    save_file(params, file)

    source = ModelSource(path=str(folder), device="cpu", dtype=dtype)
    with as_rank(0, {"data": 2}) as mesh:
        loaded = load(source, tmp_path, 0, sharding=Sharding(named_plan("fsdp"), mesh) if is_shared else None)
        before = mapped_bytes(file)
        for name, w in params.items():
            own = local_parts(loaded.params[name])
            part = w.chunk(2, loaded.params[name].placements[0].dim)[0] if is_shared and w.ndim > 1 else w
            assert own.equal(part.to(getattr(torch, dtype)))
    # those that are used as they are mapped are in memory once they have been used
    assert before < file.stat().st_size // 10
    is_mapped = dtype == "bfloat16" and not is_shared
    assert (mapped_bytes(file) > file.stat().st_size // 2) == is_mapped
    assert all(loaded.stored[name].equal(w) for name, w in params.items())
