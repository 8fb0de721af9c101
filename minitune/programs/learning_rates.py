"""Learning rates by the size of a model: what lr = "auto" takes, and what a warning compares with.

The rate of LoRA is that of Schulman et al. 2025, "LoRA Without Regret" (Thinking Machines Lab, 29
September 2025), fitted to 14 Llama and Qwen models with alpha = 32: 5e-4 (2000 / d_model)^p, with p
of the family. Their function is `get_lr` of tinker-cookbook's hyperparam_utils.py. Training whole
takes a tenth of it (the same post, "10x"). Dettmers et al. 2023 (arXiv 2305.14314, table 9) took
2e-4 for 7 and 13 billion parameters and 1e-4 for 33 and 65: within a factor of 1.7 of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from minitune.errors import InputError
from minitune.io.paths import locate
from minitune.io.toml_messages import KeyPath
from minitune.losses.registry import Loss
from minitune.models.model import Model
from minitune.models.open import open as open_model
from minitune.models.open import open_config

AUTO = "auto"
WIDTH, LORA_RATE = 2000, 5e-4  # a LoRA of a model this wide learns at this rate
LLAMA, QWEN = 0.781, 0.0775  # exponents of the width
MOST = 5e-3  # where the fit is not: models much narrower than the narrowest that it saw
ADAM = ("adamw", "adamw8bit")  # whose rates these are


def rate_by_size(model: Model, trains_whole: bool) -> float:
    """Learning rate of AdamW for supervised training of a model, with two digits.

    A family that the fit did not see takes the lower one of its two curves.
    """
    name, width = model.family.name, WIDTH / model.config.d_model
    by_family = {exponent: LORA_RATE * width**exponent for exponent in (LLAMA, QWEN)}
    rate = min(by_family.values())
    if name.startswith("llama"):
        rate = by_family[LLAMA]
    elif name.startswith("qwen"):
        rate = by_family[QWEN]
    return float(f"{min(rate, MOST) * (0.1 if trains_whole else 1):.1e}")


def complete(raw: Mapping[str, Any], where: Callable[[KeyPath], str]) -> None:
    """Write the rate into each training stage of a parsed program that has lr = "auto".

    where(path) begins a message about a value. InputError where no rule is known: for another
    optimizer than AdamW, and for a loss that compares answers.
    """
    source, trains_whole, stages = raw.get("model"), False, raw.get("stage")
    for n, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            continue  # decoding says what is wrong with it
        trains_whole = trains_whole or stage.get("op") == "full"
        loaded = stage.get("model")
        if stage.get("op") == "load" and isinstance(loaded, dict):
            # what the run itself has saved is as wide as what it was made of
            is_own = str(loaded.get("path", "")).startswith("run/")
            source, trains_whole = (source if is_own else loaded), False
        optimizer = stage.get("optimizer")
        if isinstance(optimizer, dict) and optimizer.get("lr") == AUTO:
            _require_rule(stage, optimizer, where(("stage", n, "optimizer", "lr")))
            model = _model(source)
            if model is not None:
                optimizer["lr"] = rate_by_size(model, trains_whole)


def with_auto(schema: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a program in which the rates of these optimizers may be "auto"."""
    for table in schema["$defs"].values():
        properties = table.get("properties", {})
        if properties.get("kind", {}).get("enum", [""])[0] in ADAM:
            rate = properties["lr"]
            number = {key: rate.pop(key) for key in [*rate] if key != "description"}
            rate["anyOf"] = [number, {"const": AUTO}]
    return schema


def _require_rule(stage: Mapping[str, Any], optimizer: Mapping[str, Any], where: str) -> None:
    kind, loss = optimizer.get("kind"), stage.get("loss")
    compares = {one.__struct_config__.tag for one in get_args(Loss) if one.compares_answers}
    what = ""
    if kind not in ADAM:
        what = f"optimizer.kind {kind!r}"
    elif isinstance(loss, dict) and loss.get("kind") in compares:
        what = f"loss.kind {loss['kind']!r}"
    if what:
        found = f"{where}: optimizer.lr is 'auto' with {what}"
        raise InputError(f"{found}, expected a number: no rule is known for it; write one")


def _model(source: Any) -> Model | None:
    """Model of a [model] table, without weights; None for a table that decoding will refuse."""
    if not isinstance(source, dict):
        return None
    path, config = (source.get(key) for key in ("path", "config"))
    if isinstance(path, str) and config is None:
        return open_model(locate(path))
    return open_config(locate(config)) if isinstance(config, str) and path is None else None
