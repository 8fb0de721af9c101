"""Uploads of what runs save: the stage, the verb, and the model card, from a server of our own that speaks the Hub's protocol."""

import json
import re
from pathlib import Path

import pytest
import yaml
from peft import PeftConfig

from minitune.__main__ import main
from minitune.programs.card.model_card import is_unedited
from support.hub_repositories import TOKEN
from support.hub_server import Hub, contents
from support.programs import LORA, TRAIN, evaluation, run, start

MINE = "somebody/orders"
SAVE = '[[stage]]\nop = "save"\nwhat = "deltas"\n'
UPLOAD = f'[[stage]]\nop = "upload"\nrepo = "{MINE}"\nbase = "their/base"\n'
TRAINED = evaluation("before") + LORA + TRAIN + evaluation("after") + SAVE


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def card_of(hub: Hub, repo: str = MINE) -> str:
    return hub.repositories.by_name[repo].files()["README.md"].decode()


def model_files(folder: Path) -> dict[str, bytes]:
    """Files of a folder, without hidden ones, which have the time of the save."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_program_uploads_its_adapter_with_a_card(hub: Hub, tmp_path: Path, tiny: Path) -> None:
    summary = run(tmp_path, tiny, TRAINED + UPLOAD)
    files = hub.repositories.by_name[MINE].files()
    here = model_files(tmp_path / "p/deltas")
    assert {*files} == {".gitattributes", "README.md", *here}
    changed = {name for name, data in here.items() if files[name] != data}
    assert changed == {"adapter_config.json"}
    config = json.loads(here["adapter_config.json"])
    assert json.loads(files["adapter_config.json"]) == {**config, "base_model_name_or_path": "their/base"}
    (tmp_path / "again").mkdir()
    (tmp_path / "again/adapter_config.json").write_bytes(files["adapter_config.json"])
    assert PeftConfig.from_pretrained(tmp_path / "again").base_model_name_or_path == "their/base"
    record = summary["upload"]
    assert (record["path"], record["commit"]) == (f"{hub.url}/{MINE}", hub.repositories.by_name[MINE].branches["main"])

    card = card_of(hub)
    assert head_of(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "their/base",
        "base_model_relation": "adapter",
        "tags": ["minitune", "lora", "sft"],
    }
    assert "\n# license: apache-2.0  # fill in yours" in card
    for name in ("before", "after"):
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert f"{summary[name]['loss_nats']:.4f}" in row
    rows = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text("utf-8").splitlines()]
    assert re.findall(r"^\| (\d) \| ([\d.]+) \|", card, re.MULTILINE) == [(str(r["step"]), f"{r['loss']:.4f}") for r in rows]
    assert (tmp_path / "p/program.toml").read_text("utf-8").strip() in card
    for text in (summary["after"]["samples"][0]["prompt"], summary["after"]["samples"][0]["reference"]):
        assert text in card
    assert f'PeftModel.from_pretrained(base, "{MINE}")' in card
    assert f"vllm serve their/base --enable-lora --lora-modules mine={MINE}\n" in card
    assert "llama" not in card.split("## How to load it")[1].split("## Program")[0]
    assert is_unedited(card)

    # the run is finished, and its command runs nothing again
    assert start(tmp_path, tiny, TRAINED + UPLOAD) == 0
    assert len(hub.repositories.by_name[MINE].commits) == 2


def test_a_card_that_was_edited_at_the_hub_stays(
    hub: Hub, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, tiny, LORA + '[[stage]]\nop = "save"\nwhat = "merged"\n')
    folder = tmp_path / "p/merged"
    assert main(["upload", str(folder), MINE, "--private"]) == 0
    repository = hub.repositories.by_name[MINE]
    assert repository.private
    card = card_of(hub)
    assert "base_model" not in head_of(card)
    assert f"vllm serve {MINE}" in card
    edited = card.replace("# license: apache-2.0", "license: mit #").encode()
    repository.files()["README.md"] = edited
    capsys.readouterr()
    assert main(["upload", str(tmp_path / "p"), MINE, "--base", "their/base", "--json"]) == 0
    shown = capsys.readouterr()
    assert "card: README.md of somebody/orders was edited there and stays as it is" in shown.err
    assert shown.err.endswith(", 0 files sent\n")
    commit = repository.branches["main"]
    assert json.loads(shown.out)["result"] == {"address": f"{hub.url}/{MINE}", "commit": commit, "n_sent": 0}
    assert card_of(hub).encode() == edited
    # a card of the user's own takes its place, from the folder or from a file
    (tmp_path / "mine.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert main(["upload", str(folder), MINE, "--card", str(tmp_path / "mine.md")]) == 0
    assert head_of(card_of(hub)) == {"license": "apache-2.0"}


def test_a_single_file_and_quantized_folders_have_lines_of_their_own(
    hub: Hub, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = '[[stage]]\nop = "export"\nname = "{0}"\nformat = "{0}"\n'
    quantize = '[[stage]]\nop = "quantize"\nscheme = { kind = "int8" }\n'
    run(tmp_path, tiny, quantize + export.format("compressed-tensors") + export.format("gguf"))
    assert main(["upload", str(tmp_path / "p/model.gguf"), MINE]) == 0
    files = hub.repositories.by_name[MINE].files()
    assert {*files} == {".gitattributes", "README.md", "model.gguf"}
    assert files["model.gguf"] == (tmp_path / "p/model.gguf").read_bytes()
    assert f"llama-cli -hf {MINE} --hf-file model.gguf" in card_of(hub)
    assert head_of(card_of(hub))["library_name"] == "gguf"
    capsys.readouterr()
    words = ["upload", str(tmp_path / "p/compressed-tensors"), "somebody/int8", "--print-card", "--samples", "0"]
    assert main(words) == 0
    card = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == {"card": card}
    assert head_of(card)["tags"] == ["minitune", "compressed-tensors"]
    assert "### transformers and `compressed-tensors`" in card
    assert "somebody/int8" not in hub.repositories.by_name


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (UPLOAD, "stages: upload finds nothing written, expected a save or export stage before it, or a path"),
        (LORA + SAVE + UPLOAD + 'path = "run/merged"\n', "stages: upload path 'run/merged' is not there, and no stage before"),
        (LORA + SAVE + UPLOAD.replace("somebody", "else"), "hub: else/orders is of else, and your token of somebody, expected"),
    ],
)
def test_check_finds_an_upload_that_can_t_be(
    stages: str, message: str, hub: Hub, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, tiny, stages, verb=("check",)) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "p").exists()


def test_an_upload_that_fails_loses_nothing_of_the_run(
    hub: Hub, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories.broken_after = 0
    assert start(tmp_path, tiny, LORA + SAVE + UPLOAD) == 2
    assert re.search(r"^hub: .* answered 403, expected it to take files", capsys.readouterr().err, re.MULTILINE)
    before = model_files(tmp_path / "p/deltas")
    hub.repositories.broken_after = None
    run(tmp_path, tiny, LORA + SAVE + UPLOAD)
    assert model_files(tmp_path / "p/deltas") == before
    assert "adapter_model.safetensors" in hub.repositories.by_name[MINE].files()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent", MINE], r"card: absent does not exist, expected a model folder, an adapter or a \.gguf file"),
        ([".", MINE], r"card: \. holds no config\.json, expected a model folder"),
        (["demo"], r"upload: .*OWNER/NAME"),
        (["demo", MINE, "--card", "absent.md"], r"card: absent\.md can't be read .*, expected a model card in Markdown"),
    ],
)
def test_words_that_do_not_fit_are_one_sentence(
    words: list[str], message: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["upload", *words]) == 2
    err = capsys.readouterr().err
    assert re.match(message, err)
    assert err.count("\n") == 1
    assert not hub.repositories.by_name
