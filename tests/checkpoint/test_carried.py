"""What a saved folder carries of its source, and what is said of the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitune import checkpoint, models
from minitune.checkpoint.carried import carried, notes
from minitune.checkpoint.hf_folder import load
from minitune.cli.inspect import summarize
from minitune.io.safetensors_header import read_header
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


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor in the files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        for name, entry in read_header(path).items():
            found[name] = (entry.dtype, entry.shape, data[entry.start : entry.end])
    return found


def test_a_save_leaves_every_byte_of_what_it_carries(source: Path, tmp_path: Path) -> None:
    """Of two shards, with dtypes that no decoder has, odd sizes and numbers that are not finite."""
    stored = load_file(source / "model.safetensors")
    more = {
        "model.vision_tower.position_ids": torch.arange(7).to(torch.int64),
        "model.vision_tower.mask": torch.tensor([True, False, True]),
        "model.vision_tower.scale": torch.tensor(3.0, dtype=torch.float16),
        "model.vision_tower.nothing": torch.zeros(0, 5),
        "mtp.odd.weight": torch.tensor([0x7FC1, 0xFFFF, 0x8000], dtype=torch.uint16).view(torch.bfloat16),
        "mtp.table": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    (source / "model.safetensors").unlink()
    shards = {"a.safetensors": {**more, "model.norm.weight": stored.pop("model.norm.weight")}, "b.safetensors": stored}
    for name, tensors in shards.items():
        save_file(tensors, source / name, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "preprocessor_config.json").write_bytes(b'{"size":\r\n 7}')

    model, params = load(str(source))
    trained = {name: w + 1 if name.endswith("q_proj.weight") else w for name, w in params.items()}
    extras = checkpoint.FolderExtras(source, [3], source=source)
    checkpoint.save_folder(tmp_path / "saved", trained, model, extras, shard_bytes=2000)
    before, after = stored_bytes(source), stored_bytes(tmp_path / "saved")
    assert len([*(tmp_path / "saved").glob("*.safetensors")]) > 3
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {n for n in params if n.endswith("q_proj.weight")}
    written = json.loads((tmp_path / "saved/config.json").read_text(encoding="utf-8"))
    assert written == {key: value for key, value in config.items() if key != "auto_map"}
    assert (tmp_path / "saved/preprocessor_config.json").read_bytes() == b'{"size":\r\n 7}'


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list mappings")
def test_what_is_carried_is_a_part_of_the_file_and_not_of_memory(source: Path) -> None:
    """So a save reads it piece by piece, however large it is."""
    others = carried(source)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    ours = [line[0].split("-") for line in maps if line[-1] == str(source / "model.safetensors")]
    assert others.tensors
    for w in others.tensors.values():
        assert any(int(start, 16) <= w.data_ptr() < int(end, 16) for start, end in ours)


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
