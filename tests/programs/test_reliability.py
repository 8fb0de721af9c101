"""Promises of bench/RELIABILITY.md at a small share; `-m soak` runs them in full."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import checkpoint, host
from minitune.errors import InputError
from minitune.programs.stages.training_stage import Evaluation
from support.faults import Faults, Killed
from support.numbers import STAGE, Numbers, train
from support.paths import ROOT

SHORT = msgspec.structs.replace(STAGE, steps=3, evaluate=Evaluation(data="heldout", every=2))


def kills(folder: Path, n: int, seed: int) -> dict[str, int]:
    script = ROOT / "tests/support/scripts/killed_loops.py"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), str(folder), str(n), str(seed)]
    return json.loads(subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
@pytest.mark.parametrize("n", [8, pytest.param(200, marks=pytest.mark.soak)])
def test_a_committed_step_outlives_kills_at_random_instants(n: int, tmp_path: Path) -> None:
    counts = kills(tmp_path, n, seed=n)
    assert (counts["kills"], counts["lost"], counts["unreadable"], counts["unequal"]) == (n, 0, 0, 0)
    assert counts["finished"] > 0


def finished(folder: Path) -> tuple[float, list[str], list[dict[str, Any]]]:
    """(the trained number, names of what is in the folder of states, rows without times) at the end of the stage."""
    x = float(train(folder, Numbers(skipped=(2,)), SHORT)[0])
    names = sorted(path.name for path in (folder / "checkpoints/train").iterdir())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("tokens_per_second", "mem_bytes")
    return x, names, [{key: row[key] for key in row if key not in timed} for row in rows]


ERRORS = [Killed(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), OSError(errno.EDQUOT, "quota")]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_loop_that_dies_at_any_operation_of_its_files_ends_as_the_straight_one(error: BaseException, tmp_path: Path) -> None:
    expected = finished(tmp_path / "straight")
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, error)
            with contextlib.suppress(Killed, OSError, InputError):
                train(folder, Numbers(skipped=(2,)), SHORT)
        assert finished(folder) == expected
        shutil.rmtree(folder)
        if faults.left > 0:
            break
    assert k > 30


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_every_flipped_bit_of_a_state_is_found_counters_included(n: int, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(n)
    train(tmp_path, Numbers(), SHORT)
    path = checkpoint.list_states(tmp_path / "checkpoints/train")[-1]
    like = {"trainable": {"x": torch.tensor(0.0)}}
    whole = {name: (path / name).read_bytes() for name in ("state.json", "state.safetensors")}
    before, n_found = checkpoint.load_state(path, like), 0
    for _ in range(n):
        name = sorted(whole)[int(torch.randint(2, (), generator=draw))]
        content = bytearray(whole[name])
        at = int(torch.randint(8 * len(content), (), generator=draw))
        content[at // 8] ^= 1 << at % 8
        (path / name).write_bytes(content)
        try:
            after = checkpoint.load_state(path, like)
        except InputError:
            n_found += 1
        else:
            assert after == before  # 1e-05 and 1E-05 are one number
            n_found += 1
        (path / name).write_bytes(whole[name])
    assert n_found == n


@pytest.mark.soak
def test_memory_and_descriptors_are_flat_over_many_steps(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    train(tmp_path / "warm", Numbers(), msgspec.structs.replace(SHORT, steps=200))
    peak, n_open = host.peak_bytes(), len(list(descriptors.iterdir()))
    train(tmp_path / "long", Numbers(), msgspec.structs.replace(SHORT, steps=5000))
    assert host.peak_bytes() - peak < 16 * 2**20
    assert len(list(descriptors.iterdir())) == n_open
    assert len(checkpoint.list_states(tmp_path / "long/checkpoints/train")) == 2
