"""Rows whose length a run decides: the same run as with the number, said, written down, and continued."""

import json
import tomllib
from pathlib import Path

import pytest
import torch

from minitune.__main__ import main
from minitune.programs import program
from minitune.programs.plan import planned
from support.programs import LORA, TRAIN, rows_without_time, run, run_killed, weights

STAGES = LORA + TRAIN.replace("steps = 4", "steps = 6")
AUTO = ("data.train.seq_len=auto", "data.train.overlong=truncate", "data.train.packed=false")


def test_a_run_decides_writes_and_continues_with_its_length(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, tiny, STAGES, *AUTO, name="auto")
    said = capsys.readouterr().out
    written = tomllib.loads((tmp_path / "auto/program.toml").read_text(encoding="utf-8"))["data"]["train"]["seq_len"]
    manifest = json.loads((tmp_path / "auto/manifest.json").read_text(encoding="utf-8"))
    assert manifest["seq_len"]["train"] == written
    assert written % 64 == 0
    assert f'data.train.seq_len = {written} ("auto"): the longest row has ' in said
    assert f'data.train.seq_len = {written} ("auto")' in (tmp_path / "auto/log.txt").read_text(encoding="utf-8")

    run(tmp_path, tiny, STAGES, f"data.train.seq_len={written}", *AUTO[1:], name="number")
    run_killed(tmp_path, tiny, STAGES, *AUTO, after_step=3, monkeypatch=monkeypatch)
    for name in ("number", "killed"):
        assert rows_without_time(tmp_path / name) == rows_without_time(tmp_path / "auto")
        torch.testing.assert_close(weights(tmp_path / name), weights(tmp_path / "auto"), rtol=0, atol=0)
    assert "train: continuing from step 2 of 6" in (tmp_path / "killed/log.txt").read_text(encoding="utf-8")


def test_verbs_read_a_program_whose_length_the_data_decides(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, tiny, STAGES, *AUTO)
    capsys.readouterr()
    words = [str(tmp_path / "p.toml"), f"out={tmp_path}", *AUTO]
    (train,) = planned(program.load(tmp_path / "p.toml", AUTO))
    assert (
        train.step.n_tokens
        == tomllib.loads((tmp_path / "p/program.toml").read_text(encoding="utf-8"))["data"]["train"]["seq_len"]
    )
    for verb, found in (("check", '("auto"): the longest row'), ("show", 'seq_len = "auto"'), ("show-sample", "targets")):
        assert main([verb, *words]) == 0
        assert found in capsys.readouterr().out
