"""Private training and load balancing from a program: what is refused, what is counted, and runs that resume."""

import json
from pathlib import Path

import pytest
import torch

from minitune.__main__ import main
from minitune.algorithms.privacy_accountant import epsilon_of
from support.programs import LORA, STAGES_HEAD, TRAIN, rows_without_time, run, run_killed, start, weights

UNPACKED = ("data.train.packed=false", "model.device=cpu")
PRIVACY = "privacy = { max_norm = 0.1, delta = 1e-3, %s }\n"
REFUSED = {
    "packed rows": (TRAIN + PRIVACY % "noise = 1.0", ("data.train.packed=true",), "packed = true, where several documents share"),
    "no noise": (TRAIN + "privacy = { max_norm = 0.1, delta = 1e-3 }\n", UNPACKED, "privacy has neither noise nor epsilon"),
    "both": (TRAIN + PRIVACY % "noise = 1.0, epsilon = 2.0", UNPACKED, "privacy has both noise and epsilon"),
    "several answers": (TRAIN + PRIVACY % "noise = 1.0", (*UNPACKED, "data.train.turns=each"), "several rows of one example"),
    "float16": (TRAIN + PRIVACY % "noise = 1.0", (*UNPACKED, "model.dtype=float16"), "privacy and computes in float16"),
    "no experts": (TRAIN + "load_balance = 0.01\n", (), "has load_balance and a model without experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_combined_is_refused(name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage, words, message = REFUSED[name]
    verb = () if name == "float16" else ("check",)
    assert start(tmp_path, tiny, LORA + stage, *words, verb=verb) == 2
    assert message in capsys.readouterr().err


def test_a_private_run_counts_what_it_spends_and_resumes_bit_for_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = LORA + TRAIN + PRIVACY % "epsilon = 3.0"
    words = (*UNPACKED, "train.micro_batch_size=3", "train.steps=5")
    record = run(tmp_path, tiny, stages, *words, name="straight")["train"]
    assert record["sampling_rate"] == 4 / 40
    assert record["epsilon"] == pytest.approx(epsilon_of(record["noise"], 0.1, 5, 1e-3))
    assert 2.9 < record["epsilon"] <= 3.0
    assert "train: spent epsilon" in capsys.readouterr().out
    run_killed(tmp_path, tiny, stages, *words, after_step=3, monkeypatch=monkeypatch)
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "killed")
    other = run(tmp_path, tiny, stages, *words, "train.micro_batch_size=4", name="chunks")["train"]
    assert other["noise"] == record["noise"]
    for key, leaf in weights(tmp_path / "chunks").items():
        torch.testing.assert_close(leaf, one[key], rtol=1e-4, atol=1e-5)


SHAPE = """
family = "olmoe"
n_layers = 2
n_heads = 2
n_kv_heads = 2
d_model = 32
d_head = 16
d_ff = 16
vocab_size = 1024

[experts]
n_experts = 4
n_active = 2
d_ff = 16
names = "qwen"
renormalised = false
"""


def test_a_mixture_learns_to_balance_its_experts(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "shape.toml").write_text(SHAPE, encoding="utf-8")
    full = '[[stage]]\nop = "full"\n' + TRAIN.replace("0.05", "0.01").replace("steps = 4", "steps = 12")
    model = f'config = "{tmp_path / "shape.toml"}"\ntokenizer = "{tiny / "model"}"'
    head = STAGES_HEAD.replace('path = "{tiny}/model"', model)
    ends = {}
    for coefficient in (0.0, 5.0):
        name = f"at-{coefficient:g}"
        text = head.format(name=name, tiny=tiny) + full + f"load_balance = {coefficient}\n"
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        assert main([str(tmp_path / f"{name}.toml"), f"out={tmp_path}", "model.device=cpu"]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        ends[coefficient] = [row.get("load_balance") for row in rows]
    assert ends[0.0] == [None] * 12
    assert ends[5.0][-1] < ends[5.0][0]
    assert ends[5.0][-1] == pytest.approx(2.0, abs=0.05)  # an even router has n_active
