"""QLoRA over a folder that is NF4 already: its codes and scales are kept, as bitsandbytes has them."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minitune import tree
from minitune.interop.peft.load import load_adapter
from minitune.programs import program
from minitune.programs.loading import ModelSource, load
from minitune.programs.plan import planned
from minitune.quant import nf4
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4, Int8, dequantize
from minitune.quant.tensors import QNF4
from support.programs import LORA, TRAIN, run, start
from support.programs import NF4 as QUANTIZE

SAVE = '[[stage]]\nop = "save"\nwhat = "deltas"\n[[stage]]\nop = "save"\nname = "whole"\nwhat = "merged"\ndtype = "float32"\n'
EXPORT = '[[stage]]\nop = "export"\nformat = "bitsandbytes"\n'
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.fixture(params=[True, False], ids=["double", "single"])
def base(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    """Folder that transformers quantized with bitsandbytes and saved."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", quantization_config=config, dtype=torch.float32)
    folder = tmp_path / "base/model"
    model.save_pretrained(folder)
    for file in (tiny / "model").iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    return folder


def test_the_base_is_bitsandbytes_codes_and_scales(base: Path) -> None:
    stored = load_file(base / "model.safetensors")
    loaded = load(ModelSource(str(base)), base, 0, Quantization(NF4()))
    coded = [name for name in stored if f"{name}{STATE}" in stored]
    assert sorted(n for n, w in loaded.stored.items() if isinstance(w, QNF4)) == sorted(coded)
    for name in coded:
        q, parts = loaded.stored[name], {key: w for key, w in stored.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        assert loaded.params[name].is_meta
        assert torch.equal(q.codes.flatten(), stored[name].flatten())
        assert torch.equal(nf4.blocks(q)[1].flatten(), absmax)
        # bitsandbytes' kernel for AVX512 is wrong where a row does not end with a block
        state.shape = torch.Size([absmax.numel(), state.blocksize])
        state.dtype = torch.float32
        expected = functional.dequantize_4bit(stored[name], state).reshape(q.shape)
        assert torch.equal(dequantize(q, torch.float32), expected)
        assert torch.equal(loaded.dense(name), expected.bfloat16())


def test_another_scheme_starts_from_what_the_codes_stand_for(base: Path) -> None:
    loaded = load(ModelSource(str(base)), base, 0, Quantization(Int8()))
    assert all(isinstance(w, torch.Tensor) and w.is_floating_point() for w in loaded.stored.values())


def test_a_program_trains_over_the_codes_and_merges_onto_what_they_stand_for(base: Path, tiny: Path, tmp_path: Path) -> None:
    path, before = f"model.path={base}", load_file(base / "model.safetensors")
    run(tmp_path, tiny, QUANTIZE + EXPORT, path, name="again")
    after = load_file(tmp_path / "again/bitsandbytes/model.safetensors")
    assert after.keys() == before.keys()
    assert [n for n, w in before.items() if not n.endswith(STATE) and not w.equal(after[n])] == []

    run(tmp_path, tiny, QUANTIZE + LORA + TRAIN + SAVE, path)
    loaded = load(ModelSource(str(base)), base, 0, Quantization(NF4()))
    rule, deltas, _ = load_adapter(tmp_path / "p/deltas", names=loaded.params)
    merged = load_file(tmp_path / "p/merged/model.safetensors")
    for name, delta in deltas.items():
        expected = rule.merged_weight(dequantize(loaded.stored[name], torch.float32), delta)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)


def test_plan_counts_the_codes_and_scales_that_the_folder_has(base: Path, tiny: Path, tmp_path: Path) -> None:
    assert start(tmp_path, tiny, QUANTIZE + LORA + TRAIN, f"model.path={base}", verb=("check",)) == 0
    written = program.load(tmp_path / "p.toml")
    stored = load(ModelSource(str(base)), base, 0, Quantization(NF4())).stored
    of_codes = sum(tree.n_bytes(w) for w in stored.values() if isinstance(w, QNF4))
    of_dense = sum(4 * w.numel() for w in stored.values() if isinstance(w, torch.Tensor))  # in float32
    (step,) = planned(msgspec.structs.replace(written, model=ModelSource(str(base), dtype="float32")))
    assert step.parts["weights"] == of_codes + of_dense
