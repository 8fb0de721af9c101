"""An export that its format refuses is refused by `check`, and numbers that are not finite are not written."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from minitune.__main__ import main
from minitune.algorithms.importance import Importance
from minitune.checkpoint.hf_folder import FolderExtras, save_folder
from minitune.checkpoint.tensors import require_finite
from minitune.errors import InputError
from minitune.interop.gguf.export import Types
from minitune.models import FAMILIES, Model
from minitune.programs.stages.export import Export
from minitune.programs.stages.merge import Merge
from minitune.programs.stages.quantize import Quantize
from minitune.programs.state import AbstractState
from minitune.quant.schemes import NF4, Int4, Int8
from minitune.quant.tensors import QInt8
from minitune.text.tokenizer import open_tokenizer
from support.experts import small_experts
from support.families import sized
from support.gguf_tokenizers import sentencepiece_folder
from support.models import YARNS, random_params

SIZES = {"d_model": 64, "d_head": 16, "d_ff": 64, "vocab_size": 400}
PROJECTIONS = ("*_proj.weight",)


def abstract(tmp_path: Path, family: str = "llama", **fields: object) -> AbstractState:
    """State of a program whose model and tokenizer are known."""
    config = small_experts(family) if family == "mixtral" else sized(family, **{**SIZES, **fields})
    model = Model(FAMILIES[family], config)
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    tokenizer = open_tokenizer(sentencepiece_folder(tmp_path))
    return AbstractState({}, model, params, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("scheme", "export", "message"),
    [
        (NF4(), Export(format="compressed-tensors"), "is NF4, expected int8, int4, float8, mxfp4 or nvfp4"),
        (Int8(), Export(format="bitsandbytes"), "is int8, expected NF4"),
        (Int4(32), Export(format="compressed-tensors", activations="int8"), "but no weight is int8"),
        (Int8(), Export(format="onnx"), "is quantized, expected dense weights; drop the quantize stage"),
        (NF4(), Export(format="executorch", activations="int8"), "is nf4, expected int4 or int8"),
        (None, Export(format="executorch", max_context_len=30), "max_context_len is 30, expected 2 to 29"),
        (None, Export(format="gguf", types=Types("Q8_0", {"*.nope.*": "F16"})), r"'\*.nope.\*' matches no weight"),
    ],
)
def test_what_the_format_refuses_is_refused_by_check(scheme, export, message, tmp_path: Path):
    state = abstract(tmp_path)
    if scheme is not None:
        state = Quantize(scheme=scheme, weights=PROJECTIONS).check(state)
    with pytest.raises(InputError, match=message):
        export.check(state)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {}, "a model of mixtral, expected one of llama"),
        ("llama", {"rope_scaling": YARNS[1]}, "truncate = false"),
        ("qwen2", {"d_head": 32}, "4 heads of 32 in a width of 64"),
        ("llama", {"vocab_size": 379}, "has 380 tokens, expected at most 379"),
    ],
)
def test_a_gguf_that_llama_cpp_would_not_read_is_refused_by_check(family, fields, message, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        Export(format="gguf").check(abstract(tmp_path, family, **fields))


CALIBRATION = Importance("calibration", 3)


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (Export(format="gguf", importance=CALIBRATION), r"stage export asks for data 'calibration', expected a \[data\] table"),
        (
            Export(format="compressed-tensors", importance=CALIBRATION),
            "importance and format 'compressed-tensors', expected it with",
        ),
        (
            Export(format="gguf", types=Types("Q8_0", {"*.v_proj.weight": "F16"}), importance=CALIBRATION),
            "importance and the types Q8_0, F16, expected a K type among them",
        ),
    ],
)
def test_importance_that_nothing_can_use_is_refused_by_check(export, message, tmp_path: Path):
    state = Quantize(scheme=Int8(), weights=PROJECTIONS).check(abstract(tmp_path))
    with pytest.raises(InputError, match=message):
        export.check(state)


def test_what_the_formats_hold_passes_check(tmp_path: Path):
    state = abstract(tmp_path)
    quantized = Quantize(scheme=Int4(32), weights=PROJECTIONS).check(state)
    written = {"run/executorch": "executorch"}
    assert Export(format="executorch", activations="int8").check(quantized) == quantized._replace(written=written)
    for scheme, form in ((Int8(), "compressed-tensors"), (Int4(32), "gguf"), (NF4(), "bitsandbytes")):
        quantized = Quantize(scheme=scheme, weights=PROJECTIONS).check(state)
        written = {f"run/{form}" if form != "gguf" else "run/model.gguf": form}
        assert Export(format=form).check(quantized) == quantized._replace(written=written)


def test_a_merge_leaves_no_codes_of_what_it_merged(tmp_path: Path):
    state = Quantize(scheme=Int8(), weights=PROJECTIONS).check(abstract(tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    merged = Merge(onto="stored").check(state._replace(adapted=frozenset([name])))
    assert merged.codes.keys() == state.codes.keys() - {name}


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named(value: float, word: str, dtype: torch.dtype):
    good = torch.ones(3, 5, dtype=dtype)
    bad = good.clone()
    bad[1, 2] = value
    require_finite({"a": good, "b": QInt8(torch.ones(3, 5, dtype=torch.int8), good[:, :1])}, "stages: save")
    with pytest.raises(InputError, match=f"stages: save: b holds {word}, expected finite numbers"):
        require_finite({"a": good, "b": bad}, "stages: save")
    with pytest.raises(InputError, match=f"stages: save: b holds {word}"):
        require_finite({"a": good, "b": QInt8(torch.ones(3, 5, dtype=torch.int8), bad[1:2, 2:])}, "stages: save")


def test_the_summary_has_the_sha256_of_a_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = ("Q8_0", "F16")
    export = '[[stage]]\nop = "export"\nformat = "gguf"\nname = "{0}"\npath = "run/{0}.gguf"\ntypes = {{ default = "{0}" }}\n'
    stages = "".join(export.format(kind) for kind in kinds)
    Path("g.toml").write_text(f'name = "g"\n[model]\npath = "demo"\n{stages}', encoding="utf-8")
    assert main(["g.toml"]) == 0
    summary = json.loads(Path("runs/g/summary.json").read_text(encoding="utf-8"))
    for kind in kinds:
        file = Path(f"runs/g/{kind}.gguf")
        assert summary[kind]["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


def test_importance_is_that_of_the_rows_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A file with it differs in the codes of the K types, whose bytes are those of the same weights and importance."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f'{{"text": "order {i} of 3 lamps for Ms Lee"}}\n' for i in range(9)), encoding="utf-8")
    head = 'name = "g"\n[model]\npath = "wide"\n[data.some]\npath = "rows.jsonl"\nformat = "text"\nseq_len = 32\n'
    export = '[[stage]]\nop = "export"\nformat = "gguf"\nname = "{0}"\npath = "run/{0}.gguf"\ntypes = {{ default = "Q5_K" }}\n'
    importance = 'importance = { data = "some", rows = 9 }\n'
    stages = export.format("plain") + export.format("weighed") + importance
    Path("g.toml").write_text(head + stages, encoding="utf-8")
    config = sized("llama", **{**SIZES, "d_model": 256, "vocab_size": 400, "n_layers": 1})
    model, params = Model(FAMILIES["llama"], config), random_params(config)
    tokenizer = sentencepiece_folder(tmp_path)
    save_folder(Path("wide"), params, model, FolderExtras(tokenizer, [2]))
    assert main(["g.toml"]) == 0
    assert "weighed: calibrating on 9 rows of some" in " ".join(capsys.readouterr().out.split())
    files = {name: GGUFReader(f"runs/g/{name}.gguf") for name in ("plain", "weighed")}
    found = {name: {t.name: t.data for t in file.tensors} for name, file in files.items()}
    differs = {name for name, data in found["plain"].items() if not np.array_equal(data, found["weighed"][name])}
    assert differs == {f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")} | {
        "output.weight"
    }
