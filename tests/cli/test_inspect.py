"""What inspect says of folders, against transformers and peft, and that it reads no weight and loads no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitune.__main__ import main
from minitune.cli.inspect import summarize
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.units import format_bytes
from support.models import SMALL, random_params, save_reference

DEMO = paths.PACKAGE / "demo/model"


def test_the_demo_is_described() -> None:
    assert summarize(DEMO) == (
        {
            "family": "llama",
            "architecture": "LlamaForCausalLM",
            "parameters": "1,820,352 (1.82 million)",
            "dtypes": "BF16 3.5 MiB",
            "shape": "4 layers, d_model 192, 6 heads, 3 for keys and values, d_head 32, d_ff 512",
            "context": "2,048 tokens",
            "vocabulary": "1,024 in the embedding, 1,024 in the tokenizer",
            "tied head": "yes",
            "quantized": "no",
            "tokenizer": "tokenizer.model (sentencepiece)",
            "special tokens": "bos <s> 1, eos </s> 2, unk <unk> 0, pad <pad> 3",
            "stops at": "<|end|> 6, </s> 2",
            "template": "tokenizer_config.json",
            "files": "5, 3.5 MiB",
        },
        [],
    )


def test_it_loads_no_torch() -> None:
    """Nor numpy, nor any library but the one that reads a tokenizer.model: it answers at once."""
    code = "import sys; from minitune.__main__ import main; code = main(['inspect', 'demo']); "
    code += "assert not {'torch', 'numpy', 'transformers', 'wandb'} & set(sys.modules), sys.modules"
    ran = subprocess.run([sys.executable, "-c", f"{code}; sys.exit(code)"], capture_output=True, text=True, check=True)
    assert "family" in ran.stdout
    assert "1,820,352" in ran.stdout


TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 13,
    "vocab_size": 31,
    "head_dim": 6,
    "max_position_embeddings": 77,
}
FAMILIES = [
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"sliding_window": 9, "use_sliding_window": True}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    ("gemma2", {"sliding_window": 5}),
    ("phi3", {"pad_token_id": 0}),
]


@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_parameters_are_those_that_transformers_counts(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, **more), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    rows, faults = summarize(tmp_path)
    assert faults == []
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert rows["family"] == family
    assert rows["dtypes"].startswith("BF16 ")
    assert rows["context"].startswith("77 tokens")
    assert rows["tied head"].startswith("yes" if model.config.tie_word_embeddings else "no")
    assert ("window" in rows["context"]) == ("sliding_window" in more)
    assert ("3 experts, 2 a token" in rows["shape"]) == (family == "mixtral")
    assert f"{len(list(tmp_path.iterdir()))}, " in rows["files"]


PACKED = {  # a weight of 16 x 64 as formats keep it, and what their config.json says
    "compressed-tensors": (
        {
            "w.weight_packed": torch.zeros(16, 8, dtype=torch.int32),
            "w.weight_scale": torch.ones(16, 2),
            "w.weight_shape": torch.tensor([16, 64]),
        },
        {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        "compressed-tensors pack-quantized, 4 bits",
    ),
    "gptq": (
        {"w.qweight": torch.zeros(16, 16, dtype=torch.int32), "w.qzeros": torch.zeros(1, 1), "w.scales": torch.ones(1, 16)},
        {"bits": 8},
        "gptq, 8 bits",
    ),
    "bitsandbytes": (
        {
            "w.weight": torch.zeros(512, 1, dtype=torch.uint8),
            "w.weight.absmax": torch.zeros(16, dtype=torch.uint8),
            "w.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
        },
        {},
        "bitsandbytes, 4 bits",
    ),
    "mxfp4": (
        {"e.w_blocks": torch.zeros(1, 16, 2, 16, dtype=torch.uint8), "e.w_scales": torch.zeros(1, 16, 2, dtype=torch.uint8)},
        {},
        "mxfp4, 4 bits",
    ),
}


@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_count_as_what_they_stand_for(method: str, tmp_path: Path) -> None:
    tensors, more, scheme = PACKED[method]
    save_file({**tensors, "norm.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, **more}}), encoding="utf-8")
    rows = summarize(tmp_path).rows
    assert (rows["parameters"], rows["quantized"]) == (f"{16 * 64 + 5:,}", scheme)


def folder(path: Path, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
    return path


FAST = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 7, "content": "<|im_start|>", "special": True}, {"id": 8, "content": "<|im_end|>"}],
}


def test_tokenizers_and_templates_are_told_apart(tmp_path: Path) -> None:
    rows = summarize(folder(tmp_path, config__json={"vocab_size": 9}, tokenizer__json=FAST)).rows
    assert rows["tokenizer"] == "tokenizer.json (BPE)"
    assert rows["vocabulary"] == "9 in the embedding, 9 in the tokenizer"
    assert rows["template"] == "none; the built-in ChatML one is used"
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": "x"}
    folder(tmp_path, tokenizer_config__json=config, generation_config__json={"eos_token_id": [8, 1]})
    rows = summarize(tmp_path).rows
    assert (rows["special tokens"], rows["stops at"], rows["template"]) == (
        "eos <|im_end|> 8",
        "<|im_end|> 8, 1",
        "tokenizer_config.json",
    )
    folder(tmp_path, chat_template__jinja="x", tokenizer__model="YWI= 0\nYQ== 1\n")
    assert summarize(tmp_path).rows["template"] == "chat_template.jinja"
    (tmp_path / "tokenizer.json").unlink()
    rows = summarize(tmp_path).rows
    assert (rows["tokenizer"], rows["vocabulary"]) == (
        "tokenizer.model (ranks, as Meta's)",
        "9 in the embedding, 2 in the tokenizer",
    )
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    assert summarize(tmp_path).rows["template"] == "none; the built-in plain one is used"


def test_what_wraps_a_text_model_is_named(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text",
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    rows = summarize(folder(tmp_path, config__json={"model_type": "gemma3", "text_config": text})).rows
    assert rows["family"] == "gemma3_text, text of gemma3"
    assert rows["context"] == "131,072 tokens, RoPE linear x 8.0"


def test_an_adapter_is_described(tmp_path: Path) -> None:
    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    sizes = {module: 4 if module.endswith("q_proj") else 2 for module in modules}
    tensors = {f"base_model.model.{m}.lora_A.weight": torch.zeros(r, 6) for m, r in sizes.items()}
    tensors |= {f"base_model.model.{m}.lora_B.weight": torch.zeros(5, r) for m, r in sizes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": modules,
        "base_model_name_or_path": "a/b",
        "use_dora": True,
    }
    origin = {"base": {"path": "a/b", "fingerprint": "f00d", "quantization": {"scheme": "nf4"}}}
    rows, faults = summarize(folder(tmp_path, adapter_config__json=config, minitune__json=origin))
    assert faults == []
    assert rows == {
        "adapter": "DoRA",
        "rank": "2 in 2 modules, 4 in 2 modules",
        "alpha": "8",
        "targets": "q_proj x 2, v_proj x 2",
        "parameters": "132",
        "dtypes": "F32 528 B",
        "base": "a/b",
        "base fingerprint": "f00d",
        "base quantized": "nf4, 4 bits",
        "files": rows["files"],
    }


def test_an_adapter_of_experts_is_described(tmp_path: Path) -> None:
    keys = {"self_attn.q_proj": 3, "mlp.experts.base_layer": 15, "mlp.experts": 15, "mlp.router": 3}
    save_file(
        {f"base_model.model.model.layers.0.{key}.lora_A.weight": torch.zeros(n, 6) for key, n in keys.items()},
        tmp_path / "adapter_model.safetensors",
    )
    parameters = [f"model.layers.0.mlp.{name}" for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight")]
    config = {"r": 3, "target_modules": ["model.layers.0.self_attn.q_proj"], "target_parameters": parameters}
    rows, _ = summarize(folder(tmp_path, adapter_config__json={"peft_type": "LORA", **config}))
    assert rows["rank"] == "3 in 2 modules"
    assert rows["joined experts"] == "2 tensors"
    assert rows["targets"] == "q_proj, gate_up_proj, down_proj, router"


def test_what_is_missing_or_damaged_is_told_after_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_reference(SMALL, random_params(SMALL), tmp_path)
    weight_map = {"a": "model.safetensors", "b": "gone.safetensors", "c": "../out.safetensors"}
    folder(tmp_path, model__safetensors__index__json={"weight_map": weight_map})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-3])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "llama" in out
    faults = err.splitlines()
    assert len(faults) == 3
    assert "points to '../out.safetensors', expected a file in its own folder" in faults[0]
    assert "gone.safetensors does not exist" in faults[1]
    assert (
        f"model.safetensors is no whole safetensors file (its tensors end at byte {len(whole)}, the file at {len(whole) - 3})"
        in faults[2]
    )


def test_other_folders_and_damaged_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds neither config\.json nor adapter_config\.json, expected a model or adapter folder"
    ):
        summarize(tmp_path)
    for text in ("[]", "{", "[" * 100_000, '{"a": 1' + "0" * 10_000):
        with pytest.raises(InputError, match=r"config\.json can't be read \(.*\), expected a JSON object; fetch the file again"):
            summarize(folder(tmp_path, config__json=text))
    folder(tmp_path, config__json={}, tokenizer__model="no model")
    with pytest.raises(InputError, match=r"tokenizer\.model can't be read by sentencepiece"):
        summarize(tmp_path)


def test_a_file_can_not_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(folder(tmp_path, config__json={"model_type": "\x1b[2J[red]evil"}))])
    assert "\\x1b[2J[red]evil" in capsys.readouterr().out


def test_bytes_are_told_as_a_person_reads_them() -> None:
    sizes = [0, 1023, 1024, 1536, 10 * 2**20, 2**30, 5 * 2**40, 2**60]
    assert [format_bytes(n) for n in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "10.0 MiB",
        "1.0 GiB",
        "5.0 TiB",
        "1048576.0 TiB",
    ]
