"""What a model is when it has been loaded."""

from pathlib import Path

import pytest
import torch

from minitune.models.open import open_config
from minitune.programs.loading import ModelSource, load
from minitune.programs.sharding import Sharding
from minitune.sharding.parts import is_sharded, local_parts
from minitune.sharding.plans import named_plan
from support.fake_ranks import as_rank
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
