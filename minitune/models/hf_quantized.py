"""Quantized folders: which ones are read, and a sentence for each of the others."""

from collections.abc import Mapping
from typing import Any

from minitune.errors import InputError, quoted

# fields of config.json that tell of codes; the second is that of mlx
KEYS = ("quantization_config", "quantization", "compression_config")
REMEDY = "take the unquantized folder; for QLoRA put a quantize stage before lora"


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
    if method == "fp8" or (method == "mxfp4" and model_type == "gpt_oss"):
        return
    mxfp4 = "MXFP4, " if model_type == "gpt_oss" else ""
    raise InputError(
        f"models: {where} is quantized as {quoted(method)}, expected plain weights, {mxfp4}"
        f"FP8 with scales or bitsandbytes' NF4; {REMEDY}"
    )
