"""Promises of bench/RELIABILITY.md at a small share; `-m soak` runs them in full."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import checkpoint, host
from minitune.errors import DiskFullError, InputError
from minitune.io import atomic
from minitune.io.json_file import read_json
from minitune.programs import records
from minitune.programs.manifest import Manifest
from minitune.programs.stages.training_stage import Evaluation
from support.faults import Faults, Killed
from support.numbers import STAGE, Numbers, train
from support.paths import ROOT
from support.programs import LORA, STAGES_HEAD, TRAIN, evaluation, spawn
from support.small_disks import grow, small_disk

GOLDEN = ROOT / "tests/programs/golden"  # a folder for each released format, cut off after the second of three steps
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
    # current_epoch: rows of the first release have none
    timed = ("tokens_per_second", "mem_bytes", "current_epoch")
    return x, names, [{key: row[key] for key in row if key not in timed} for row in rows]


ERRORS = [Killed(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), OSError(errno.EDQUOT, "quota")]


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_loop_that_dies_at_any_operation_of_its_files_ends_as_the_straight_one(
    error: BaseException, in_background: bool, tmp_path: Path
) -> None:
    stage = msgspec.structs.replace(SHORT, save_in_background=in_background)
    expected = finished(tmp_path / "straight")
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, error)
            with contextlib.suppress(Killed, OSError, InputError):
                train(folder, Numbers(skipped=(2,)), stage)
            for thread in threading.enumerate():
                if thread.name == "save":  # of a process that has died, in its end
                    thread.join()
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


@pytest.mark.parametrize("share", [i / 15 for i in range(16)])
def test_a_full_disk_of_any_size_keeps_the_state_before(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = {"w": torch.arange(3000.0), "n": torch.tensor(1)}
    before = {**like, "w": like["w"] + 1}
    checkpoint.save_state(tmp_path, 1, before, {})
    free = round(share * 1.2 * 12_008)
    monkeypatch.setattr(atomic, "free_bytes", lambda path: free)
    if free < 12_008:
        message = rf"step-00000002 needs 12,008 bytes for the training state, its disk has {free:,} free"
        with pytest.raises(DiskFullError, match=message):
            checkpoint.save_state(tmp_path, 2, like, {})
    else:
        checkpoint.save_state(tmp_path, 2, like, {})
    states = checkpoint.list_states(tmp_path)
    assert len(states) == (1 if free < 12_008 else 2)
    assert torch.equal(checkpoint.load_state(states[0], like)[0]["w"], before["w"])
    assert sorted(tmp_path.iterdir()) == states


@pytest.mark.parametrize("version", [path.name for path in GOLDEN.iterdir()])
def test_the_run_folder_of_each_released_format_is_read_and_continued(version: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / version, tmp_path / "golden"))
    straight, continued = finished(tmp_path / "straight"), finished(folder)
    assert continued == straight
    assert records.read_summary(folder / "summary.json") == records.summary(records.read_records(folder / "records.json"))
    manifest = read_json(folder / "manifest.json", Manifest, "runs", "begin afresh")
    assert manifest.starts[-1].versions == {"minitune": version}


@pytest.mark.soak
def test_memory_and_descriptors_are_flat_over_many_steps(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    train(tmp_path / "warm", Numbers(), msgspec.structs.replace(SHORT, steps=200))
    peak, n_open = host.peak_bytes(), len(list(descriptors.iterdir()))
    train(tmp_path / "long", Numbers(), msgspec.structs.replace(SHORT, steps=5000))
    assert host.peak_bytes() - peak < 16 * 2**20
    assert len(list(descriptors.iterdir())) == n_open
    assert len(checkpoint.list_states(tmp_path / "long/checkpoints/train")) == 2


STAGES = f"""{LORA}{TRAIN.replace("steps = 4", "steps = 30").replace("save_every = 2", "save_every = 5")}
evaluate = {{ data = "heldout", every = 10 }}
[[stage]]
op = "merge"
[[stage]]
op = "quantize"
scheme = {{ kind = "int4", group = 32 }}
method = {{ kind = "gptq", data = "train", rows = 40 }}
{evaluation("after")}
[[stage]]
op = "generate"
data = "heldout"
max_new_tokens = 20
[[stage]]
op = "export"
format = "compressed-tensors"
"""
EXIT_S = 10.0  # promised after a signal: torchrun kills after 30
N_SIGNALS = int(os.environ.get("MINITUNE_SOAK_SIGNALS", "20"))
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.soak
def test_a_signal_after_any_line_of_a_program_is_survived(tiny: Path, tmp_path: Path) -> None:
    """A program of all kinds of work stops at a signal wherever it is, and then ends as the straight one."""

    def program(name: str) -> list[str]:
        (tmp_path / f"{name}.toml").write_text(STAGES_HEAD.format(name=name, tiny=tiny) + STAGES, encoding="utf-8")
        return [str(tmp_path / f"{name}.toml"), f"out={tmp_path}"]

    def result(name: str) -> tuple[bytes, str]:
        written = tmp_path / name / "compressed-tensors" / "model.safetensors"
        return written.read_bytes(), (tmp_path / name / "generate.jsonl").read_text(encoding="utf-8")

    with spawn(program("straight")) as straight:
        n_lines = len(straight.communicate()[0].splitlines())
    assert straight.returncode == 0
    expected = result("straight")
    for i in range(N_SIGNALS):
        name, number = f"p{i}", SIGNALS[i % len(SIGNALS)]
        with spawn(program(name)) as stopped:
            assert stopped.stdout is not None
            for _ in range(1 + i * n_lines // N_SIGNALS):
                stopped.stdout.readline()
            time.sleep(0.4 * random.Random(i).random())
            stopped.send_signal(number)
            _, errors = stopped.communicate(timeout=EXIT_S)
        assert stopped.returncode in (0, 128 + number, -number), errors  # the last before its handlers stand
        assert "Traceback" not in errors
        with spawn(program(name)) as again:
            again.communicate()
        assert again.returncode == 0
        assert result(name) == expected


def used_kib(folder: Path) -> int:
    """Size of what lies in a folder, in pages of 4 KiB."""
    return sum(4 * (1 + path.stat().st_size // 4096) for path in folder.rglob("*"))


@pytest.mark.soak
@pytest.mark.parametrize("place", ["out", "cache"])
def test_a_run_on_a_disk_of_any_size_ends_in_words_and_goes_on_when_there_is_room(place: str, tiny: Path, tmp_path: Path) -> None:
    """16 sizes of a real file system, from one that holds nothing to one that holds all."""
    text = STAGES_HEAD.format(name="p", tiny=tiny) + LORA + TRAIN + '[[stage]]\nop = "save"\nwhat = "merged"\n'
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")

    def ended(disk: Path, other: Path) -> tuple[int, str]:
        out, cache = (disk, other) if place == "out" else (other, disk)
        words = [str(tmp_path / "p.toml"), f"out={out / 'runs'}"]
        with spawn(words, env={**os.environ, "XDG_CACHE_HOME": str(cache / "cache")}) as process:
            errors = process.communicate()[1]
        return process.returncode, errors

    def saved(out: Path) -> bytes:
        return (out / "runs/p/merged/model.safetensors").read_bytes()

    assert ended(tmp_path / "all", tmp_path / "rest")[0] == 0
    straight = saved(tmp_path / ("all" if place == "out" else "rest"))
    whole, codes = used_kib(tmp_path / "all"), []
    for i in range(16):
        other = tmp_path / f"other{i}"
        with small_disk(tmp_path / f"disk{i}", 4 + round(1.4 * whole * i / 15)) as disk:
            code, errors = ended(disk, other)
            assert code in (0, 3), errors
            assert errors.count("\n") == (code == 3), errors
            codes.append(code)
            grow(disk, 4 * whole)
            assert ended(disk, other) == (0, "")
            assert saved(disk if place == "out" else other) == straight
    print(f"{place}: exit codes by size {codes}")  # noqa: T201 - bench/RELIABILITY.md records them (pytest -s)
    assert codes[0] == 3
    assert codes[-1] == 0
