"""Quantized folders: which ones are read, and a sentence for each of the others."""

from collections.abc import Mapping
from typing import Any

from minitune.errors import InputError, quoted

# fields of config.json that tell of codes; the second is that of mlx
KEYS = ("quantization_config", "quantization", "compression_config")
REMEDY = "take the unquantized folder; for QLoRA put a quantize stage before lora"


# of compressed-tensors; in the last one, weights have any of the others
COMPRESSED = (
    *("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"),
    *("mxfp4-pack-quantized", "nvfp4-pack-quantized", "mixed-precision"),
)

# configs of torchao whose codes are integers, one a byte
TORCHAO = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "IntxWeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
)


def is_quantized(hf: Mapping[str, Any]) -> bool:
    """True for a config.json that tells of codes."""
    return any(hf.get(key) for key in KEYS)


def check(hf: Mapping[str, Any], model_type: str, where: str) -> None:
    """InputError for a config.json of weights that are codes which are not read."""
    config = next((hf[key] for key in KEYS if hf.get(key)), None)
    if config is None:
        return
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if method is None and hf.get("quantization"):
        method = "mlx"
    if method == "bitsandbytes" and isinstance(config, Mapping):
        kind = config.get("bnb_4bit_quant_type", "fp4") if config.get("load_in_4bit") else "int8"
        if kind == "nf4":
            return
        method = f"bitsandbytes {kind}"
    if method == "compressed-tensors" and isinstance(config, Mapping):
        if _is_read(config):
            return
        method = f"compressed-tensors {config.get('format')}" if config.get("format") else method
    if method == "torchao" and isinstance(config, Mapping):
        kind = _torchao_type(config)
        if kind in TORCHAO:
            return
        method = f"torchao {kind}" if kind else method
    if method == "fp8" or (method == "mxfp4" and model_type == "gpt_oss"):
        return
    mxfp4 = "MXFP4, " if model_type == "gpt_oss" else ""
    raise InputError(
        f"models: {where} is quantized as {quoted(method)}, expected plain weights, {mxfp4}"
        "FP8 with scales, bitsandbytes' NF4, compressed-tensors of symmetric codes in 4 or 8 "
        f"bits, or torchao's {', '.join(TORCHAO)}; {REMEDY}"
    )


def _torchao_type(config: Mapping[str, Any]) -> str | None:
    """Name of the config that torchao quantized by."""
    rule = config.get("quant_type")
    rule = rule.get("default") if isinstance(rule, Mapping) else None
    name = rule.get("_type") if isinstance(rule, Mapping) else None
    return name if isinstance(name, str) else None


def _is_read(config: Mapping[str, Any]) -> bool:
    """True for compressed-tensors whose codes are symmetric, in 4 or 8 bits, and of the weights as
    they are.
    """
    if config.get("format") not in COMPRESSED:
        return False
    if config.get("transform_config") or config.get("sparsity_config"):
        return False
    groups = config.get("config_groups") or {}
    rules = (
        [_weight_rule(group) for group in groups.values()] if isinstance(groups, Mapping) else []
    )
    return all(rule.get("symmetric", True) and rule.get("num_bits") in (4, 8) for rule in rules)


def _weight_rule(group: Any) -> Mapping[str, Any]:
    """Rule that a group of compressed-tensors has for its weights; nothing where it has none."""
    rule = group.get("weights") if isinstance(group, Mapping) else None
    return rule if isinstance(rule, Mapping) else {}
