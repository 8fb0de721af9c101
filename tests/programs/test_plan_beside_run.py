"""Memory of a run beside its plan: a process of its own, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitune.programs import program
from minitune.programs.plan import planned
from support.paths import ROOT


@pytest.mark.parametrize("remat", ["false", "true"])
def test_a_run_takes_the_memory_that_is_planned_for_it(tmp_path: Path, remat: str) -> None:
    """Between what the step needs and the peak that is expected with holes, each within a tenth; few steps leave few holes."""
    words = ["train.steps=3", f"train.remat={remat}", f"out={tmp_path}"]
    text = (ROOT / "programs/lora.toml").read_text(encoding="utf-8")
    stages = text.split("[[stage]]")
    kept = [stage for stage in stages[1:] if 'op      = "lora"' in stage or 'op         = "train"' in stage]
    assert len(kept) == 2
    file = tmp_path / "p.toml"
    file.write_text("[[stage]]".join([stages[0], *(stage.split("[stage.evaluate]")[0] for stage in kept)]), encoding="utf-8")
    (one,) = planned(program.load(file, words))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minitune", str(file), *words]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    record = json.loads((tmp_path / "lora/summary.json").read_text(encoding="utf-8"))
    assert record["peak_mem_bytes"] >= 0.9 * (one.process_bytes + one.n_bytes)
    assert record["peak_mem_bytes"] <= 1.1 * one.peak_bytes
