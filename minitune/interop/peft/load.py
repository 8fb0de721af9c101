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
from minitune.errors import InputError, cut, quoted
from minitune.interop.peft import experts
from minitune.interop.peft.layout import (
    CONFIG,
    HEAD,
    ORIGIN,
    PARTS,
    PREFIX,
    WEIGHTS,
    Base,
    alpha_of,
    module_name,
)
from minitune.interop.peft.whole import (
    MERGE,
    changed_copies,
    copied_weight,
    is_kept,
    refused,
    require_tied,
)
from minitune.io.json_file import read_json
from minitune.io.tensor_names import is_unmodelled
from minitune.lora import Lora
from minitune.models.fused_experts import is_single, parameters, places
from minitune.models.hf_multimodal import text_name
from minitune.types import Delta, Fraction, PositiveFloat, PositiveInt, Trainable

# others can take for ever on a module's name
BOUNDED = re.compile(r"(?s)(?!.*\)[*+?])([^*+?{]*[*+?]){0,3}[^*+?{]*")


class _Config(msgspec.Struct):
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


class _Origin(msgspec.Struct):
    """Content of minitune.json beside an adapter."""

    base: Base


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


def load_adapter(folder: Path, *, names: Collection[str]) -> tuple[Lora, Trainable, Base | None]:
    """Rule, deltas with whole tensors, and base (if minitune wrote it) of a PEFT LoRA adapter.

    names: the weights of the model that it is for, best with the weights themselves: an adapter may
    hold copies of embedding and head, which train whole where they are not the base's.
    InputError names what the adapter uses beyond LoRA, rsLoRA and DoRA.
    """
    config, where = _config(folder), str(folder / WEIGHTS)
    parts, whole, copies = _tensors(folder, config)
    _require_all_parts(parts, config, folder)
    rule, deltas = _rule(config, _adapted(config, parts, names, folder))
    whole = {**whole, **changed_copies(copies, names, deltas, where)}
    return rule, {**deltas, **require_tied(whole, deltas, names, where)}, _base(folder)


def _tensors(
    folder: Path, config: _Config
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """(parts a, b and m of each adapted module, tensors trained whole, copies of the base's).

    The latter two are by the names of their weights; all are in float32.
    """
    kept = [*(config.modules_to_save or []), *[module_name(HEAD)] * config.ensure_weight_tying]
    where = str(folder / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in load_tensors(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else ""
        part = next((part for part, suffix in PARTS.items() if name.endswith(suffix)), None)
        if not tensor.is_floating_point():
            expected = "expected floating point; save it again"
            raise InputError(f"peft: {where} holds {key} as {tensor.dtype}, {expected}")
        if is_unmodelled(name):
            raise InputError(
                f"peft: {where} adapts {quoted(name)}, a part that sees images, expected deltas "
                f"of the text model alone; {MERGE}"
            )
        copied = copied_weight(name)
        if part is not None:
            module = name.removesuffix(PARTS[part])
            parts[module] = {**parts.get(module, {}), part: tensor.float()}
        elif is_kept(name, kept) and ".lora_" not in name:
            whole[text_name(name) or name] = tensor.float()
        elif copied is not None:
            copies[copied] = tensor.float()
        else:
            raise refused(key, where)
    return parts, whole, copies


def _require_all_parts(
    parts: Mapping[str, Mapping[str, Tensor]], config: _Config, folder: Path
) -> None:
    """InputError unless every adapted module has A and B, and a magnitude exactly if the adapter is
    a DoRA.
    """
    wanted = ["a", "b", "m"] if config.use_dora else ["a", "b"]
    for module, present in parts.items():
        if sorted(present) != wanted:
            keys = (f"{PREFIX}{module}{PARTS[part]}" for part in sorted(present))
            raise InputError(
                f"peft: {folder / WEIGHTS} holds {', '.join(keys)}, expected "
                f"{', '.join(PARTS[part] for part in wanted)} of "
                f"every adapted module with use_dora = {json.dumps(config.use_dora)}"
            )


class _Adapted(NamedTuple):
    """Delta, and the alpha that PEFT scales it by."""

    delta: Delta
    alpha: float


class _Place(NamedTuple):
    """Position of an adapted module in the model.

    weight: the name of its weight, without a parameter; parameter: the stacked experts that PEFT
    adapts as one parameter, or ""; path: its name in PEFT's patterns of ranks and alphas.
    """

    weight: str
    parameter: str
    path: str


class _Names(NamedTuple):
    """Names of a model's weights; parameters: PEFT's name of each weight of an expert; joined: the
    weights of each of those.
    """

    weights: frozenset[str]
    parameters: Mapping[str, str]
    joined: Mapping[str, list[str]]


def _place(config: _Config, module: str, names: _Names) -> _Place:
    inside = (text_name(f"{module}.") or f"{module}.").removesuffix(".")
    outer = inside.removesuffix(".base_layer")
    raw = module.removesuffix(".base_layer")

    # PEFT wraps the second parameter of a module around the first, whose keys then lie under
    # `base_layer`.
    stacked = [
        one
        for one in experts.STACKED
        if f"{outer}.{one}" in names.joined and _is_target(config, f"{raw}.{one}")
    ]
    if inside != outer and len(stacked) < 2:
        stacked = []
    weight = f"{inside}.weight"
    if weight not in names.weights:
        weight = next(iter(names.joined.get(weight, [])), weight)
    if stacked:
        one = stacked[-1] if inside == outer else stacked[0]
        return _Place(weight, f"{outer}.{one}", f"{raw}.{one}")

    # A router is a parameter to PEFT though its delta is that of one weight.
    candidates = [f"{module}.weight"]
    if not is_single(weight):
        candidates.append(names.parameters.get(weight, ""))
    return _Place(
        weight, "", next((path for path in candidates if _is_target(config, path)), module)
    )


def _adapted(
    config: _Config, parts: Mapping[str, Mapping[str, Tensor]], names: Collection[str], folder: Path
) -> dict[str, _Adapted]:
    """Deltas by the names of the weights; InputError where their ranks are not what the config
    says.
    """
    known = _Names(frozenset(names), parameters(names), places(names))
    adapted: dict[str, _Adapted] = {}
    for module, present in parts.items():
        place = _place(config, module, known)
        rank = _of_pattern(config.rank_pattern, place.path, config.r, folder)
        delta = Delta(**present)
        _require_rank(
            delta, rank, is_stacked=bool(place.parameter), where=f"{folder / WEIGHTS}: {module}"
        )
        deltas = {place.weight: delta}
        if place.parameter:
            deltas = experts.unflattened(
                place.parameter, delta.a, delta.b, rank, known.joined[place.parameter]
            )
        alpha = _of_pattern(config.alpha_pattern, place.path, config.lora_alpha, folder)
        adapted |= {name: _Adapted(one, alpha) for name, one in deltas.items()}
    return adapted


def _require_rank(delta: Delta, rank: int, *, is_stacked: bool, where: str) -> None:
    """InputError unless A and B have the rank, times a number of experts if they are stacked, and m
    a value for each row of B.
    """
    a, b, m = delta
    n = len(a) // rank if is_stacked and a.ndim == 2 else 1
    if a.ndim != 2 or b.ndim != 2 or n == 0 or a.shape[0] != n * rank or b.shape[1] != n * rank:
        raise InputError(
            f"peft: {where} has A {list(a.shape)} and B {list(b.shape)}, expected [{rank}, in] and "
            f"[out, {rank}]{', times the number of experts,' * is_stacked} as {CONFIG} says; save "
            "the adapter again"
        )
    if isinstance(m, Tensor) and m.shape != b.shape[:1]:
        raise InputError(
            f"peft: {where} has a magnitude {list(m.shape)}, expected [{b.shape[0]}] as its B has "
            "rows"
        )


def _is_target(config: _Config, path: str) -> bool:
    """True if target_parameters holds a parameter: its path, or the end of it from a dot on."""
    return any(path == end or path.endswith(f".{end}") for end in config.target_parameters or [])


def _config(folder: Path) -> _Config:
    path = folder / CONFIG
    _require_weights(folder)
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        used = [key for key, value in raw.items() if value and value != "none"]
        odd = [key for key in used if key not in HARMLESS and key not in _Config.__struct_fields__]
        if odd:
            found = f"{path} has {cut(odd[0])} = {quoted(raw[odd[0]])}"
            raise InputError(f"peft: {found}, expected LoRA, rsLoRA or DoRA alone; {MERGE}")
        ways = raw.get("init_lora_weights")
        if isinstance(ways, str) and ways.startswith(CHANGE_THE_BASE):
            raise InputError(
                f"peft: {path} has init_lora_weights = {quoted(ways)}, which changes the weights "
                "of "
                "the base, expected deltas on the base as it is; save it again with PEFT's "
                "path_initial_model_for_weight_conversion, or merge it with PEFT first"
            )
        return msgspec.convert(raw, _Config)
    except OSError:
        raise InputError(
            f"peft: {path} does not exist, expected a folder with {CONFIG} and {WEIGHTS}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"peft: {path}: {quoted(error)}; expected a LoRA adapter of PEFT"
        ) from None


def _require_weights(folder: Path) -> None:
    """InputError for an adapter whose weights are pickled, or that has none."""
    pickled = folder / "adapter_model.bin"
    if not (folder / WEIGHTS).exists() and pickled.exists():
        raise InputError(
            f"peft: {folder} holds {pickled.name}, which is pickled and not read, expected "
            f"{WEIGHTS}; "
            "convert it: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )


def _rule(config: _Config, adapted: Mapping[str, _Adapted]) -> tuple[Lora, dict[str, Delta]]:
    """Rule that gives every delta the scale that PEFT gives it, and the deltas.

    Where alphas differ so that no rule does, the rest of the scale is folded into b: the forward is
    the same.
    """
    others = {
        name: one.delta.a.shape[-2]
        for name, one in adapted.items()
        if one.delta.a.shape[-2] != config.r
    }
    rule = Lora(
        config.r,
        config.lora_alpha,
        tuple(adapted),
        others,
        config.use_rslora,
        config.use_dora,
        config.lora_dropout or 0.0,
    )
    # what `save` writes of rsLoRA with several ranks: alpha / rank, each alpha in proportion to
    # sqrt(rank)
    rooted = msgspec.structs.replace(rule, alpha=config.lora_alpha / config.r**0.5, rslora=True)
    if not config.use_rslora and all(
        math.isclose(one.alpha, alpha_of(rooted, one.delta.a.shape[-2])) for one in adapted.values()
    ):
        return rooted if others else rule, {name: one.delta for name, one in adapted.items()}
    rests = {name: one.alpha / config.lora_alpha for name, one in adapted.items()}
    return rule, {
        name: one.delta if rests[name] == 1 else one.delta._replace(b=rests[name] * one.delta.b)
        for name, one in adapted.items()
    }


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any, folder: Path) -> Any:
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
                "expression with at most three "
                f"repetitions, none of a group ({error}); name the module instead"
            ) from None
        if suffix.match(module):
            return value
    return default


def _base(folder: Path) -> Base | None:
    path = folder / ORIGIN
    if not path.is_file():
        return None
    return read_json(path, _Origin, "peft", "remove it to go on without knowing the base").base
