"""A bench that can't be run where the tests run still runs at toy size."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from support.paths import ROOT


def test_the_gpu_bench_fills_its_table_at_toy_size() -> None:
    words = [sys.executable, "bench/gpu.py", "--device", "cpu", "--toy"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    title, header, _, *rows = done.stdout.strip().splitlines()
    assert title.count("CPU, ") == 4
    assert header.count("|") == 9
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert [row[:4] for row in table] == [
        [kind, n, "no", remat]
        for kind in ("lora", "qlora", "float8", "full")
        for remat in ("no", "yes", "host")
        for n in ("32", "128")
    ]
    for row in table:
        assert re.fullmatch(r"[\d,]+", row[4]), row
        assert re.fullmatch(r"[\d.]+%", row[5]), row
        assert row[7] == ""


def is_there(module: str, name: str) -> bool:
    """True for a name of a module, and for a module of a package."""
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def test_what_benches_import_from_the_package_is_there() -> None:
    """A name that has moved would be found when somebody waits for a figure."""
    missing = [
        f"{file.name}: {alias.name}"
        for file in sorted((ROOT / "bench").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("minitune")
        for alias in node.names
        if not is_there(str(node.module), alias.name)
    ]
    assert not missing


def test_what_the_time_does_not_reach_is_a_row_that_says_so() -> None:
    words = [sys.executable, "bench/gpu.py", "--device", "cpu", "--toy", "--budget-s", "0.3"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| no time left |") == 24


def test_a_variant_that_fails_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    gpu = importlib.import_module("gpu")
    errors = iter([torch.OutOfMemoryError("14 GiB"), RuntimeError("a | b\nc")])

    def measured(*_: Any) -> dict[str, Any]:
        if error := next(errors, None):
            raise error
        return {"time_s": 2.0, "n_tokens": 128, "companions": 9.0, "peak": 2**31}

    monkeypatch.setattr(gpu, "measured", measured)
    gpu.run_kind("lora", Namespace(device="cpu", toy=True, tokens=128, head_chunk=None))
    _, *results = map(json.loads, capsys.readouterr().out.splitlines())
    assert results[:2] == [{"reason": "out of memory"}, {"reason": "RuntimeError: a | b"}]
    assert [one["tokens_per_s"] for one in results[2:]] == [64.0] * 4
    assert gpu.row("lora", (32, "yes", "no"), results[1]) == "| lora | 32 | yes | no |  |  |  | RuntimeError: a / b |"
    assert gpu.row("lora", (32, "yes", "no"), {**results[2], "share": 0.5}) == "| lora | 32 | yes | no | 64 | 50.0% | 2.0 |  |"


def test_packed_rows_are_full_and_know_how_long_their_documents_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    gpu = importlib.import_module("gpu")
    batch, companions = gpu.packed_rows(97, 1000, 250, "cpu")
    assert tuple(batch.tokens.shape) == (4, 250)
    lengths = [int((row == k).sum()) for row in batch.segment_ids for k in row.unique()]
    assert companions == sum(n * n for n in lengths) / 1000
    assert bool((batch.segment_ids > 0).all())


def test_the_bench_of_scaling_fills_its_table_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in importlib.import_module("scaling").lines(toy=True)]
    assert [row[:5] for row in rows] == [["adapters", "2", "300", n, "1 x 16"] for n in ("1", "2")]
    assert all(re.fullmatch(r"[\d,]+ ±[\d,]+", row[5]) and re.fullmatch(r"\d+%", row[6]) for row in rows)
    assert [row[7] for row in rows] == ["1", ""]
