"""Adapters of PEFT read as deltas and the rule that they follow."""

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from torch import Tensor

from minitune.checkpoint.tensors import load_tensors
from minitune.errors import InputError
from minitune.interop.peft import experts
from minitune.interop.peft.layout import CONFIG, EMBEDDING, HEAD, ORIGIN, PARTS, PREFIX, WEIGHTS, Base, alpha_of, module_name
from minitune.lora import Lora
from minitune.models.hf_multimodal import text_name
from minitune.types import Delta, PositiveFloat, PositiveInt, Trainable

BOUNDED = re.compile(r"(?s)(?!.*\)[*+?])([^*+?{]*[*+?]){0,3}[^*+?{]*")  # others can take for ever on a module's name


class _Config(msgspec.Struct):
    """What is understood of adapter_config.json."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] | None = True  # other ways change the base weights


# what changes nothing in an adapter's forward, or is told by the tensors as well
HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    ]
)


def load_adapter(folder: Path, *, names: Collection[str]) -> tuple[Lora, Trainable, Base | None]:
    """(rule, deltas and whole tensors, what they were trained on if minitune wrote them) of a PEFT LoRA adapter for a model with
    weights of these names; InputError names what the adapter uses beyond LoRA, rsLoRA and DoRA."""
    config = _config(folder)
    kept = [*(config.modules_to_save or []), *[module_name(HEAD)] * config.ensure_weight_tying]
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in load_tensors(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else ""
        part = next((part for part, suffix in PARTS.items() if name.endswith(suffix)), None)
        if not tensor.is_floating_point():
            raise InputError(f"peft: {folder / WEIGHTS} holds {key} as {tensor.dtype}, expected floating point; save it again")
        if part is not None:
            module = name.removesuffix(PARTS[part])
            found[module] = {**found.get(module, {}), part: tensor.float()}
        elif any(module_name(name).endswith(module) for module in kept) and ".lora_" not in name:
            whole[text_name(name) or name] = tensor.float()
        else:
            raise InputError(
                f"peft: {folder / WEIGHTS} holds {key}, expected {PREFIX}<module>.lora_A.weight, .lora_B.weight or "
                ".lora_magnitude_vector, or a tensor of modules_to_save; merge it with PEFT first"
            )
    if EMBEDDING in whole and HEAD not in names:
        head = whole.pop(HEAD, None)
        if head is None or not head.equal(whole[EMBEDDING]):
            raise InputError(
                f"peft: {folder} trains {EMBEDDING} apart from the head, which this model ties to it; expected one tensor for "
                "both (PEFT's ensure_weight_tying)"
            )
    wanted = ["a", "b", *["m"] * config.use_dora]
    for module, parts in found.items():
        if sorted(parts) != wanted:
            keys = (f"{PREFIX}{module}{PARTS[part]}" for part in sorted(parts))
            raise InputError(
                f"peft: {folder / WEIGHTS} holds {', '.join(keys)}, expected {', '.join(PARTS[part] for part in wanted)} of "
                f"every adapted module with use_dora = {json.dumps(config.use_dora)}"
            )
    rule, deltas = _rule(config, _adapted(config, found, names, folder))
    return rule, {**deltas, **whole}, _base(folder)


class _Adapted(NamedTuple):
    """A delta, and the alpha that PEFT scales it by."""

    delta: Delta
    alpha: float


def _adapted(
    config: _Config, found: Mapping[str, Mapping[str, Tensor]], names: Collection[str], folder: Path
) -> dict[str, _Adapted]:
    """The deltas by the names of the weights; InputError where their ranks are not what the config says."""
    deltas: dict[str, _Adapted] = {}
    known, parameters, places = frozenset(names), experts.parameters(names), experts.places(names)
    for module, parts in found.items():
        inside = (text_name(f"{module}.") or f"{module}.").removesuffix(".")
        outer, raw = inside.removesuffix(".base_layer"), module.removesuffix(".base_layer")
        held = [one for one in experts.STACKED if f"{outer}.{one}" in places and _asked(config, f"{raw}.{one}")]
        held = [] if inside != outer and len(held) < 2 else held
        one = "" if not held else held[-1] if inside == outer else held[0]
        name = f"{inside}.weight"
        name = name if name in known else next(iter(places.get(name, [])), name)
        known_as = [f"{module}.weight", *([] if experts.is_single(name) else [parameters.get(name, "")])]
        path = f"{raw}.{one}" if held else next((path for path in known_as if _asked(config, path)), module)
        rank = _of_pattern(config.rank_pattern, path, config.r, folder)
        a, b, m = Delta(**parts)
        n = len(a) // rank if held and a.ndim == 2 else 1
        if a.ndim != 2 or b.ndim != 2 or n == 0 or a.shape[0] != n * rank or b.shape[1] != n * rank:
            raise InputError(
                f"peft: {folder / WEIGHTS}: {module} has A {list(a.shape)} and B {list(b.shape)}, expected [{rank}, in] and "
                f"[out, {rank}]{', times the number of experts,' * bool(held)} as {CONFIG} says; save the adapter again"
            )
        if isinstance(m, Tensor) and m.shape != b.shape[:1]:
            raise InputError(
                f"peft: {folder / WEIGHTS}: {module} has a magnitude {list(m.shape)}, expected [{b.shape[0]}] as its B has rows"
            )
        place = f"{outer}.{one}"
        each = experts.unflattened(place, a, b, rank, places[place]) if held else {name: Delta(a, b, m)}
        alpha = _of_pattern(config.alpha_pattern, path, config.lora_alpha, folder)
        deltas |= {name: _Adapted(delta, alpha) for name, delta in each.items()}
    return deltas


def _asked(config: _Config, path: str) -> bool:
    """Whether target_parameters holds a parameter: its path, or the end of it from a dot on."""
    return any(path == end or path.endswith(f".{end}") for end in config.target_parameters or [])


def _config(folder: Path) -> _Config:
    path = folder / CONFIG
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        used = [key for key, value in raw.items() if value and value != "none"]
        odd = [key for key in used if key not in HARMLESS and key not in _Config.__struct_fields__]
        if odd:
            raise InputError(
                f"peft: {path} has {odd[0]} = {raw[odd[0]]!r}, expected LoRA, rsLoRA or DoRA alone; merge it with PEFT first"
            )
        return msgspec.convert(raw, _Config)
    except OSError:
        raise InputError(f"peft: {path} does not exist, expected a folder with {CONFIG} and {WEIGHTS}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"peft: {path}: {error}; expected a LoRA adapter of PEFT") from None


def _rule(config: _Config, adapted: Mapping[str, _Adapted]) -> tuple[Lora, dict[str, Delta]]:
    """The rule that gives every delta the scale that PEFT gives it, and the deltas.

    Where alphas differ so that no rule does, the rest of the scale is folded into b: the forward is the same.
    """
    others = {name: one.delta.a.shape[-2] for name, one in adapted.items() if one.delta.a.shape[-2] != config.r}
    rule = Lora(config.r, config.lora_alpha, tuple(adapted), others, config.use_rslora, config.use_dora)
    # what `save` writes of rsLoRA with several ranks: alpha / rank, each alpha in proportion to sqrt(rank)
    rooted = msgspec.structs.replace(rule, alpha=config.lora_alpha / config.r**0.5, rslora=True)
    if not config.use_rslora and all(
        math.isclose(one.alpha, alpha_of(rooted, one.delta.a.shape[-2])) for one in adapted.values()
    ):
        return rooted if others else rule, {name: one.delta for name, one in adapted.items()}
    rests = {name: one.alpha / config.lora_alpha for name, one in adapted.items()}
    return rule, {
        name: one.delta if rests[name] == 1 else one.delta._replace(b=rests[name] * one.delta.b) for name, one in adapted.items()
    }


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any, folder: Path) -> Any:
    """The value under the first key that, as a regular expression, matches the end of a module's path, from a dot on."""
    for key, value in (pattern or {}).items():
        try:
            if BOUNDED.fullmatch(key) is None:
                raise re.error("it repeats too much")
            with warnings.catch_warnings(action="error"):
                suffix = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise InputError(
                f"peft: {folder / CONFIG} has {key[:200]!r} as a pattern, expected a regular expression with at most three "
                f"repetitions, none of a group ({error}); name the module instead"
            ) from None
        if suffix.match(module):
            return value
    return default


def _base(folder: Path) -> Base | None:
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[Literal["base"], Base])["base"]
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(f"peft: {path} can't be read ({error}); remove it to go on without knowing the base") from None
