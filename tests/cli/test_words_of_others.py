"""Words and files of torchtune: each is named for what it is, and answered by what does the same here."""

import json
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.checkpoint.weight_files import weight_files
from minitune.cli.model_folders import result_of
from minitune.errors import InputError
from minitune.io.foreign_weights import foreign_weights
from minitune.models.open import folder_problem
from minitune.programs import program
from minitune.programs.check import data_notes
from minitune.programs.report import report
from support.paths import ROOT

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run lora_finetune_single_device --config Y", "that is torchtune's; docs/from-torchtune.md"),
        ("run full_finetune_distributed", "that is torchtune's; docs/from-torchtune.md"),
        ("run --nproc_per_node 2 full_finetune_distributed", "that is torchtune's; docs/from-torchtune.md"),
        ("eleuther_eval", "that is torchtune's; docs/from-torchtune.md"),
        ("download a/b --output-dir x", "download: --output-dir is unknown, expected options here; write --to DIR"),
        ("download a/b --hf-token=x", "download: --hf-token is unknown, .*; set the variable HF_TOKEN"),
        ("check lora save.what=params", "holds deltas, expected 'merged', 'deltas', or a merge stage before it"),
    ],
)
def test_a_word_of_torchtune_is_answered(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    with pytest.raises(InputError, match=message):
        raise InputError(capsys.readouterr().err.strip())


@pytest.mark.parametrize("option", ["--config", "--nproc_per_node=2"])
def test_an_option_of_tune_run_names_the_page(option: str) -> None:
    with pytest.raises(InputError, match=r"a program is the first word, and has no YAML: docs/from-torchtune.md"):
        program.load(ROOT / "programs/lora.toml", [option])


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("adapter_0.pt", "torchtune's adapter"),
        ("hf_model_0001_0.pt", "torchtune's weights"),
        ("consolidated.00.pth", "Meta's own"),
    ],
)
def test_a_folder_of_another_format_says_what_it_is(tmp_path: Path, file: str, what: str) -> None:
    assert foreign_weights(tmp_path) is None
    (tmp_path / file).touch()
    assert f"{file} is {what}" in folder_problem(tmp_path)
    with pytest.raises(InputError, match=f"{file} is {what}"):
        weight_files(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2


def test_a_run_with_an_export_stands_for_its_dense_folder(tmp_path: Path) -> None:
    for name, content in {"compressed-tensors": {"quantization_config": {}}, "merged": {}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("manifest.json", "program.toml", "summary.json"):
        (tmp_path / name).write_text("{}" if name.endswith("json") else 'stage = []\n[model]\npath = "base"\n', encoding="utf-8")
    assert result_of(str(tmp_path), "eval") == str(tmp_path / "merged")


def test_no_share_keeps_no_rows_apart() -> None:
    for none in ("0", "0.0"):
        loaded = program.load(ROOT / "programs/sft.toml", [f"data.train.holdout={none}"])
        assert list(loaded.data) == ["train"]
        assert loaded.data["train"].split is None


def test_no_rows_apart_names_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "sft", "data.train.holdout=0"]) == 2
    assert "data.train.holdout = 0.05 keeps rows apart as that" in capsys.readouterr().err


def test_a_table_that_no_stage_uses_has_no_note(tmp_path: Path) -> None:
    for override, n_notes in (("generate.prompt=hello", 0), ("generate.limit=1", 1)):
        loaded = program.load(ROOT / "programs/generate.toml", [override, f"model.path={tmp_path}"])
        notes = [line for line in data_notes(loaded.model, loaded.data, loaded.stage) if "still the demo's" in line]
        assert len(notes) == n_notes


def test_the_values_of_the_harness_stand_in_the_table() -> None:
    from rich.console import Console

    metrics = {"acc": {"value": 0.25, "stderr": 0.1}, "exact_match": {"value": 1.0, "stderr": None}}
    record = {"lm_eval": "0.4", "tasks": {"orders": {"metrics": metrics, "n_samples": 4}}, "time_s": 1.0}
    for width in (100, 20):
        console = Console(width=100, record=True)
        with console.capture() as shown:
            console.print(report("run", {"harness": record}, width))
        assert "orders acc 0.2500" in shown.get()
        assert "orders exact_match 1.0000" in shown.get()
