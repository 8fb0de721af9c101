"""A saved adapter's folder is what serves it: PEFT opens it on its base, AutoTokenizer opens it alone."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minitune.io.results import MARKER
from minitune.text.chat import open_template
from minitune.text.folder_files import text_files
from minitune.text.tokenizer import open_tokenizer
from support.closeness import distance
from support.programs import LORA, TRAIN, run

SAVE = '[[stage]]\nop = "save"\nwhat = "deltas"\n[[stage]]\nop = "save"\nname = "whole"\nwhat = "merged"\ndtype = "float32"\n'
SAID = [{"role": "user", "content": "Nine lamps"}, {"role": "assistant", "content": "for Oslo"}]
FUNCTION = {"type": "function", "function": {"name": "x", "description": "", "parameters": {"type": "object"}}}
TOOLS = "{{ tools | length }} {% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a program whose model has a template for tools and says what ends an answer."""
    folder = tmp_path_factory.mktemp("served")
    base = folder / "base/model"
    shutil.copytree(tiny / "model", base)
    default = open_template(base, open_tokenizer(base)).source
    (base / "chat_template.jinja").write_text(default, encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text(TOOLS, encoding="utf-8")
    (base / "generation_config.json").write_text('{"eos_token_id": 5, "top_k": 7}', encoding="utf-8")
    run(folder, tiny, LORA + TRAIN + SAVE, f"model.path={base}")
    return folder / "p"


def test_peft_opens_the_adapter_on_its_base(saved: Path) -> None:
    tokens = torch.randint(0, 1000, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(saved / "deltas", dtype=torch.float32)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(saved / "merged", dtype=torch.float32)(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(saved.parent / "base/model", dtype=torch.float32)(tokens).logits
    assert distance(adapted, merged) < 1e-5 < 1e-3 < distance(base, merged)


@pytest.mark.parametrize("result", ["deltas", "merged"])
def test_tokenizer_and_templates_are_those_of_training(result: str, saved: Path) -> None:
    base = saved.parent / "base/model"
    ours, theirs = AutoTokenizer.from_pretrained(saved / result), AutoTokenizer.from_pretrained(base)
    for tools in (None, [FUNCTION]):
        rendered = theirs.apply_chat_template(SAID, tools=tools, tokenize=False)
        assert ours.apply_chat_template(SAID, tools=tools, tokenize=False) == rendered
        assert ours(rendered).input_ids == theirs(rendered).input_ids
    carried = {file.relative_to(base): file.read_bytes() for file in text_files(base)}
    assert {file.relative_to(saved / result): file.read_bytes() for file in text_files(saved / result)} == carried
    assert Path("additional_chat_templates/tool_use.jinja") in carried


@pytest.mark.parametrize("result", ["deltas", "merged"])
def test_the_trained_end_of_a_turn_joins_those_of_the_base(result: str, saved: Path) -> None:
    generation = GenerationConfig.from_pretrained(saved / result)
    assert (generation.eos_token_id, generation.top_k) == ([5, 6, 2], 7)


def test_the_summary_has_the_sha256_of_what_was_written(saved: Path) -> None:
    stages = json.loads((saved / "summary.json").read_text(encoding="utf-8"))
    for stage, result in (("save", "deltas"), ("whole", "merged")):
        files = {file.name: file for file in (saved / result).glob("*.*") if file.name != MARKER}
        hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
        assert hashes.items() <= stages[stage]["sha256"].items()
        assert any(name.endswith(".safetensors") for name in hashes)


def test_a_built_in_template_is_written_beside_the_adapter(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base)
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    run(tmp_path, tiny, LORA + '[[stage]]\nop = "save"\nwhat = "deltas"\n', f"model.path={base}")
    written = (tmp_path / "p/deltas/chat_template.jinja").read_text(encoding="utf-8")
    assert written == open_template(base, open_tokenizer(base)).source
