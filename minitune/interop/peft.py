"""LoRA adapters in PEFT's layout (adapter_config.json, adapter_model.safetensors), in the form that other servers read too."""

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from torch import Tensor

from minitune import checkpoint
from minitune.lora import Lora
from minitune.types import Delta, InputError, Trainable

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = "minitune.json"  # beside them: what PEFT has no field for, and ignores
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BOUNDED = re.compile(r"(?s)(?!.*\)[*+?])([^*+?{]*[*+?]){0,3}[^*+?{]*")  # others can take for ever on a module's name
PARTS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "m": ".lora_magnitude_vector"}


class Base(msgspec.Struct, frozen=True):
    """What deltas were trained on: the model's path then, checkpoint.fingerprint of its weights, and how they were quantized."""

    path: str
    fingerprint: str | None = None
    quantization: dict[str, Any] | None = None


def save(
    folder: Path,
    trainable: Trainable,
    lora: Lora,
    *,
    base: str,
    fingerprint: str | None,
    quantization: Mapping[str, Any] | None,
    names: Collection[str],
) -> None:
    """Write deltas, and tensors trained whole beside them, so that PeftModel.from_pretrained(base model, folder) gives the same
    logits; names: those of all the model's weights. InputError for what PEFT can't hold: a delta and a whole tensor in one
    module, or a part of a module that has other parts.

    The scale is always written as alpha / rank, because not every server knows rsLoRA.
    """
    deltas = {_module(name): leaf for name, leaf in trainable.items() if isinstance(leaf, Delta)}
    whole = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Tensor)}
    tie = EMBEDDING in whole and HEAD not in names  # PEFT then wants the shared tensor under both of its names
    whole = {**whole, HEAD: whole[EMBEDDING]} if tie else whole
    both = next((name for name in whole if _module(name) in deltas), None)
    if both is not None:
        raise InputError(
            f"peft: {both} trains whole and {_module(both)} has a delta, expected one of them: PEFT holds no more; save it merged"
        )
    apart = next((name for name in names if _module(name) in map(_module, whole) and name not in whole), None)
    if apart is not None:
        raise InputError(
            f"peft: {apart} does not train, but another tensor of its module trains whole, expected both: PEFT keeps modules"
        )
    joint = next((name for name, leaf in trainable.items() if isinstance(leaf, Delta) and leaf.a.ndim != 2), None)
    if joint is not None:
        raise InputError(f"peft: {joint} has one delta for all experts, expected deltas of [out, in] weights; save it merged")
    ranks = {module: delta.a.shape[0] for module, delta in deltas.items()}
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != lora.rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": _alpha(lora, lora.rank),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(lora, rank) for module, rank in others.items()} if lora.rslora else {},
        # experts by the last part of their names: transformers keeps them in one tensor, and PEFT looks for them so
        "target_modules": list(dict.fromkeys(m.rpartition(".")[2] if ".experts." in m else m for m in deltas)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        # whole paths, because PEFT takes every module whose path ends so: "norm" would be each layer's norms too
        "modules_to_save": list(dict.fromkeys(_module(name) for name in whole)) or None,
        "ensure_weight_tying": tie,
        "use_rslora": False,
        "use_dora": lora.dora,
    }
    parts = {
        f"{module}{PARTS[part]}": leaf
        for module, delta in deltas.items()
        for part, leaf in delta._asdict().items()
        if isinstance(leaf, Tensor)
    }
    tensors = {f"{PREFIX}{name}": leaf for name, leaf in {**parts, **whole}.items()}
    origin = Base(base, fingerprint, dict(quantization) if quantization is not None else None)
    with checkpoint.atomic_folder(folder) as aside:
        checkpoint.save_tensors(aside / WEIGHTS, tensors)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / ORIGIN).write_text(json.dumps({"base": msgspec.to_builtins(origin)}, indent=2) + "\n", encoding="utf-8")


class _Config(msgspec.Struct):
    """What is understood of adapter_config.json."""

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
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


def load(folder: Path, *, names: Collection[str]) -> tuple[Lora, Trainable, Base | None]:
    """(rule, deltas and whole tensors, what they were trained on if minitune wrote them) of a PEFT LoRA adapter for a model with
    weights of these names; InputError names what the adapter uses beyond LoRA, rsLoRA and DoRA."""
    config = _config(folder)
    kept = [*(config.modules_to_save or []), *[_module(HEAD)] * config.ensure_weight_tying]
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in checkpoint.load_tensors(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else ""
        part = next((part for part, suffix in PARTS.items() if name.endswith(suffix)), None)
        if not tensor.is_floating_point():
            raise InputError(f"peft: {folder / WEIGHTS} holds {key} as {tensor.dtype}, expected floating point; save it again")
        if part is not None:
            module = name.removesuffix(PARTS[part])
            found[module] = {**found.get(module, {}), part: tensor.float()}
        elif any(_module(name).endswith(module) for module in kept) and ".lora_" not in name:
            whole[name] = tensor.float()
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
    deltas = {module: Delta(**parts) for module, parts in found.items()}
    return _rule(config, deltas, folder), {**{f"{module}.weight": d for module, d in deltas.items()}, **whole}, _base(folder)


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


def _rule(config: _Config, deltas: Mapping[str, Delta], folder: Path) -> Lora:
    """The rule that gives every delta the scale that PEFT gives it; InputError where ranks or scales do not fit one rule."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, (a, b, m) in deltas.items():
        rank = _of_pattern(config.rank_pattern, module, config.r, folder)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise InputError(
                f"peft: {folder / WEIGHTS}: {module} has A {list(a.shape)} and B {list(b.shape)}, expected [{rank}, in] and "
                f"[out, {rank}] as {CONFIG} says; save the adapter again"
            )
        if isinstance(m, Tensor) and m.shape != b.shape[:1]:
            raise InputError(
                f"peft: {folder / WEIGHTS}: {module} has a magnitude {list(m.shape)}, expected [{b.shape[0]}] as its B has rows"
            )
        ranks[module] = rank
        alphas[module] = _of_pattern(config.alpha_pattern, module, config.lora_alpha, folder)
    others = {f"{module}.weight": rank for module, rank in ranks.items() if rank != config.r}
    targets = tuple(f"{module}.weight" for module in deltas)
    rule = Lora(config.r, config.lora_alpha, targets, others, config.use_rslora, config.use_dora)
    if all(alpha == config.lora_alpha for alpha in alphas.values()):
        return rule
    # what `save` writes of rsLoRA with several ranks: alpha / rank, each alpha in proportion to sqrt(rank)
    rooted = msgspec.structs.replace(rule, alpha=config.lora_alpha / config.r**0.5, rslora=True)
    if not config.use_rslora and all(math.isclose(alphas[m], _alpha(rooted, rank)) for m, rank in ranks.items()):
        return rooted
    raise InputError(
        f"peft: {folder / CONFIG} has alpha_pattern = {config.alpha_pattern!r}, expected one scale rule, alpha / r or "
        "alpha / sqrt(r), for all modules; merge it with PEFT first"
    )


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


def _alpha(lora: Lora, rank: int) -> float:
    """The alpha of alpha / rank that gives the rule's scale at a rank."""
    return lora.alpha * rank**0.5 if lora.rslora else lora.alpha


def _module(name: str) -> str:
    return name.rpartition(".")[0]
