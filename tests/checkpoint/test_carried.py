"""What a saved folder carries of its source, and what is said of the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitune import checkpoint, models
from minitune.checkpoint.carried import notes
from minitune.checkpoint.hf_folder import load
from minitune.cli.inspect import summarize
from support.closeness import distance
from support.models import SMALL, random_batch, random_params, save_reference
from support.programs import LORA, run

AUTO_MAP = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "who/repo--modeling_phi3.Phi3ForCausalLM"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Folder of a model with a head that guesses further tokens, and an auto_map."""
    folder = tmp_path / "source"
    save_reference(SMALL, random_params(SMALL), folder)
    tensors = load_file(folder / "model.safetensors")
    more = {"model.mtp_layers.0.input_proj.weight": torch.randn(3, 5), "mtp.norm.weight": torch.randn(7).to(torch.bfloat16)}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": AUTO_MAP, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_heads_that_guess_further_tokens_are_carried_and_said(source: Path, tmp_path: Path) -> None:
    model, params = load(str(source))
    checkpoint.save_folder(tmp_path / "saved", params, model, checkpoint.FolderExtras(source, [3], source=source))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(w.equal(after[name]) for name, w in before.items())
    tokens = random_batch(SMALL, 2, 9).tokens
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(tokens).logits
    assert distance(model.forward(params, tokens), theirs) <= 1e-5
    assert models.open(tmp_path / "saved") == model
    assert notes(source)[0] == f"2 tensors of mtp, mtp_layers are carried as they are in {source}"
    assert notes(source, text_alone=True)[0] == "2 tensors of mtp, mtp_layers are left out: only the text model is here"
    assert summarize(source).rows["not trained"] == "2 tensors of mtp, mtp_layers, 74 B"


def test_an_auto_map_is_left_out_and_named_with_its_files(source: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    for file in (tiny / "model").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, source)
    weights = load_file(tiny / "model/model.safetensors")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    run(tmp_path, tiny, LORA + '[[stage]]\nop = "save"\nwhat = "merged"\n', f"model.path={source}")
    files = "configuration_phi3.py, modeling_phi3.py"
    named = f"auto_map of {source / 'config.json'} is left out, as are the files that it names ({files})"
    assert named in " ".join(capsys.readouterr().out.split())
    assert "auto_map" not in json.loads((tmp_path / "p/merged/config.json").read_text(encoding="utf-8"))
    assert summarize(source).rows["left out of saves"] == "auto_map"
