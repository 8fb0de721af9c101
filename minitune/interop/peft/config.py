"""Content of adapter_config.json, as far as it changes what an adapter computes."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from minitune.errors import InputError, cut, quoted
from minitune.interop.peft.layout import CONFIG, WEIGHTS
from minitune.interop.peft.whole import MERGE
from minitune.types import Fraction, PositiveFloat, PositiveInt

# others can take for ever on a module's name
BOUNDED = re.compile(r"(?s)(?!.*\)[*+?])([^*+?{]*[*+?]){0,3}[^*+?{]*")
# ways to begin that PEFT repeats when it loads an adapter, and that take from the base what they
# give
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys that change nothing in an adapter's forward, or that only repeat what the tensors say.
HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    ]
)


class AdapterConfig(msgspec.Struct):
    """Keys of adapter_config.json that change the forward and are understood."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: Fraction | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    # other ways change the base weights
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] | None = True

    def is_target(self, path: str) -> bool:
        """True if target_parameters holds a parameter: its path, or the end of it from a dot on."""
        ends = self.target_parameters or []
        return any(path == end or path.endswith(f".{end}") for end in ends)


def read_config(folder: Path) -> AdapterConfig:
    """Config of an adapter; InputError for one that is damaged, or that is more than LoRA."""
    path = folder / CONFIG
    _require_weights(folder)
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        _require_lora_alone(raw, path)
        return msgspec.convert(raw, AdapterConfig)
    except OSError:
        raise InputError(
            f"peft: {path} does not exist, expected a folder with {CONFIG} and {WEIGHTS}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"peft: {path}: {quoted(error)}; expected a LoRA adapter of PEFT"
        ) from None


def _require_lora_alone(raw: Mapping[str, Any], path: Path) -> None:
    """InputError for a key that is in use and not understood, and for a changed base."""
    used = [key for key, value in raw.items() if value and value != "none"]
    known = HARMLESS.union(AdapterConfig.__struct_fields__)
    odd = next((key for key in used if key not in known), None)
    if odd is not None:
        found = f"{path} has {cut(odd)} = {quoted(raw[odd])}"
        raise InputError(f"peft: {found}, expected LoRA, rsLoRA or DoRA alone; {MERGE}")
    ways = raw.get("init_lora_weights")
    if isinstance(ways, str) and ways.startswith(CHANGE_THE_BASE):
        raise InputError(
            f"peft: {path} has init_lora_weights = {quoted(ways)}, which changes the weights of "
            "the base, expected deltas on the base as it is; save it again with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with PEFT first"
        )


def _require_weights(folder: Path) -> None:
    """InputError for an adapter whose weights are pickled, or that has none."""
    pickled = folder / "adapter_model.bin"
    if not (folder / WEIGHTS).exists() and pickled.exists():
        raise InputError(
            f"peft: {folder} holds {pickled.name}, which is pickled and not read, expected "
            f"{WEIGHTS}; convert it: PeftModel.from_pretrained(base, "
            "folder).save_pretrained(new_folder)"
        )


def of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any, folder: Path) -> Any:
    """Value under the first key that, as a regular expression, matches the end of a module's path,
    from a dot on.
    """
    for key, value in (pattern or {}).items():
        try:
            if BOUNDED.fullmatch(key) is None:
                raise re.error("it repeats too much")
            with warnings.catch_warnings(action="error"):
                suffix = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise InputError(
                f"peft: {folder / CONFIG} has {key[:200]!r} as a pattern, expected a regular "
                f"expression with at most three repetitions, none of a group ({error}); name the "
                "module instead"
            ) from None
        if suffix.match(module):
            return value
    return default
