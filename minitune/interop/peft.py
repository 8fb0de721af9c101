"""LoRA adapters in PEFT's layout (adapter_config.json, adapter_model.safetensors), in the form that other servers read too."""

import json
from pathlib import Path

import msgspec
from torch import Tensor

from minitune import checkpoint
from minitune.lora import Lora
from minitune.types import Delta, Deltas, InputError

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save(folder: Path, deltas: Deltas, lora: Lora, base: str) -> None:
    """Write deltas so that PeftModel.from_pretrained(base model, folder) gives the same logits; `base` names their model."""
    modules = [name.removesuffix(".weight") for name in deltas]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors: dict[str, Tensor] = {}
    for module, delta in zip(modules, deltas.values(), strict=True):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = delta.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = delta.b
    with checkpoint.atomic_folder(folder) as aside:
        checkpoint.save_tensors(aside / WEIGHTS, tensors)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Config(msgspec.Struct):
    """What is read of adapter_config.json; the fields below `target_modules` must keep their defaults to be understood here."""

    peft_type: str
    r: int
    lora_alpha: float
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: list[str] | None = None


def load(folder: Path) -> tuple[Lora, Deltas]:
    """(rule, deltas) of a PEFT LoRA adapter; InputError names what it uses beyond plain LoRA, and any key that does not fit."""
    path = folder / CONFIG
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except OSError:
        raise InputError(f"peft: {path} does not exist, expected a folder with {CONFIG} and {WEIGHTS}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"peft: {path}: {error}") from None
    plain = _Config(peft_type="LORA", r=config.r, lora_alpha=config.lora_alpha)
    odd = [field for field in config.__struct_fields__ if (getattr(config, field) or None) != (getattr(plain, field) or None)]
    if odd:
        raise InputError(
            f"peft: {path} has {odd[0]} = {getattr(config, odd[0])!r}, expected plain LoRA; merge it with PEFT first"
        )
    tensors = checkpoint.load_tensors(folder / WEIGHTS)
    deltas: dict[str, Delta] = {}
    for key in tensors:
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        pair = [f"{PREFIX}{module}.lora_{half}.weight" for half in "AB"]
        if key not in pair or not all(name in tensors for name in pair):
            raise InputError(
                f"peft: {folder / WEIGHTS} holds {key}, expected pairs {PREFIX}<module>.lora_A.weight and .lora_B.weight"
            )
        a, b = (tensors[name] for name in pair)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != config.r or b.shape[1] != config.r:
            raise InputError(
                f"peft: {module} has A {list(a.shape)} and B {list(b.shape)}, expected [{config.r}, in] and [out, {config.r}]"
            )
        deltas[f"{module}.weight"] = Delta(a.float(), b.float())
    return Lora(config.r, config.lora_alpha, tuple(deltas)), deltas
