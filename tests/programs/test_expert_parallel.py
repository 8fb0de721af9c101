"""A run of a mixture whose experts ranks share, and what it writes."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from minitune import checkpoint
from minitune.__main__ import main
from minitune.checkpoint.tensors import load_tensors
from minitune.io import paths
from minitune.models import FAMILIES
from minitune.models.model import Model
from support.families import config_of
from support.models import random_params
from support.programs import TINY
from tests.programs.test_ranks import COMMAND, finished, written

STAGES = """
[[stage]]
op = "full"
[[stage]]
op = "train"
data = "train"
steps = 3
batch_size = 3
save_every = 2
optimizer = { kind = "sgd", lr = 0.01 }
evaluate = { data = "heldout", every = 2, batch_size = 8 }
[[stage]]
op = "save"
what = "params"
"""


def write_mixture(folder: Path, tiny: Path) -> None:
    """Fill a folder as `tiny` is filled, but with a mixture of four experts."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("model"))
    config = config_of("mixtral")
    experts = msgspec.structs.replace(config.experts, n_experts=4)
    config = msgspec.structs.replace(config, experts=experts, vocab_size=TINY.vocab_size)
    params = {name: 0.1 * w for name, w in random_params(config).items()}
    extras = checkpoint.FolderExtras(paths.locate("demo"), [])
    checkpoint.save_folder(folder / "model", params, Model(FAMILIES["mixtral"], config), extras)


@pytest.mark.parametrize("mesh", ["mesh={data=1,expert=2}"])
def test_ranks_that_share_experts_write_what_one_process_writes(mesh: str, tmp_path: Path, tiny: Path) -> None:
    mixture = tmp_path / "mixture"
    write_mixture(mixture, tiny)
    assert main([written(tmp_path, mixture, "one", STAGES), f"out={tmp_path}"]) == 0
    words = [written(tmp_path, mixture, "two", STAGES), f"out={tmp_path}", "plan=ep", mesh, "--ranks", "2"]
    done = finished([*COMMAND, *words])
    assert done.returncode == 0, done.stderr
    one, two = (load_tensors(next((tmp_path / name).rglob("model.safetensors"))) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, rtol=1e-5, atol=1e-6)


def test_experts_that_ranks_can_not_share_are_refused(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = tmp_path / "mixture"
    write_mixture(mixture, tiny)
    for folder, ranks, message in (
        (mixture, 3, "the axis expert has 3 ranks, among which 4 experts are dealt out, expected one of 1, 2, 4"),
        (tiny, 2, "the plan cuts 'experts', which no matrix of this model has: it is no mixture"),
    ):
        words = [written(tmp_path, folder, "bad", STAGES), f"out={tmp_path}", "plan=ep", f"mesh={{data=1,expert={ranks}}}"]
        assert main(words) != 0
        assert message in capsys.readouterr().err.replace("\n", " ")
