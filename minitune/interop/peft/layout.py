"""Names and files of a PEFT adapter."""

from typing import Any

import msgspec

from minitune.lora import Lora

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = "minitune.json"  # beside them: what PEFT has no field for, and ignores
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PARTS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "m": ".lora_magnitude_vector"}


class Base(msgspec.Struct, frozen=True):
    """Base that deltas were trained on: its path then, fingerprint.folder_fingerprint of it, and
    its quantization.
    """

    path: str
    fingerprint: str | None = None
    quantization: dict[str, Any] | None = None


def alpha_of(lora: Lora, rank: int) -> float:
    """Alpha of alpha / rank that gives the rule's scale at a rank."""
    return lora.alpha * rank**0.5 if lora.rslora else lora.alpha


def module_name(name: str) -> str:
    """Module of a weight: its name without the last part."""
    return name.rpartition(".")[0]
