"""Quantized leaves made by hand, and folders of them as transformers reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitune.checkpoint import FolderExtras
from minitune.interop import compressed_tensors
from minitune.models import Model
from minitune.models.families import llama
from minitune.quant.tensors import QInt4, QInt8

CONFIG = llama.Config(n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_head=16, d_ff=128, vocab_size=17, max_positions=64)


def int8(w: Tensor) -> QInt8:
    scale = w.abs().amax(1, keepdim=True) / 127
    return QInt8((w / scale).round().to(torch.int8), scale)


def int4(w: Tensor, group: int) -> QInt4:
    blocks = w.unflatten(1, (-1, group))
    scale = blocks.abs().amax(2, keepdim=True) / 7.5
    codes = ((blocks / scale).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    return QInt4(codes[:, ::2] | codes[:, 1::2] << 4, scale.squeeze(2))


def dense(w: Any) -> Tensor:
    """The weight that a leaf stands for, in float32."""
    if isinstance(w, QInt8):
        return w.codes.float() * w.scale.float()
    if isinstance(w, QInt4):
        codes = torch.stack([w.codes & 15, w.codes >> 4], dim=2).flatten(1).float() - 8
        return (codes.unflatten(1, (w.scale.shape[1], -1)) * w.scale.float()[..., None]).flatten(1)
    return w


def folder_of(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "tokenizer"


def save_compressed(tmp_path: Path, params: Mapping[str, Any], config: llama.Config = CONFIG, activations: str = "none") -> Path:
    extras = FolderExtras(folder_of(tmp_path), [3], template="{{ bos_token }}")
    compressed_tensors.save(tmp_path / "model", params, Model(llama.FAMILY, config), extras, activations=activations)
    return tmp_path / "model"


def logits_of_transformers(folder: Path, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(tokens).logits


def is_linear(name: str) -> bool:
    return "_proj.weight" in name


TOKENS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
