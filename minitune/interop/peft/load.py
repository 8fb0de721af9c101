"""Adapters of PEFT read as deltas and the rule that they follow."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch import Tensor

from minitune.checkpoint.tensors import load_tensors
from minitune.errors import InputError, quoted
from minitune.interop.peft import experts
from minitune.interop.peft.config import AdapterConfig, of_pattern, read_config
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
from minitune.interop.peft.places import place_of, weight_names
from minitune.interop.peft.whole import (
    MERGE,
    changed_copies,
    copied_weight,
    is_kept,
    require_tied,
    unknown_tensor,
)
from minitune.io.json_file import read_json
from minitune.io.tensor_names import is_unmodelled
from minitune.lora import Lora
from minitune.models.hf_multimodal import text_name
from minitune.types import Delta, Trainable


class _Origin(msgspec.Struct):
    """Content of minitune.json beside an adapter."""

    base: Base


def load_adapter(folder: Path, *, names: Collection[str]) -> tuple[Lora, Trainable, Base | None]:
    """Rule, deltas with whole tensors, and base (if minitune wrote it) of a PEFT LoRA adapter.

    names: the weights of the model that it is for, best with the weights themselves: an adapter may
    hold copies of embedding and head, which train whole where they are not the base's.
    InputError names what the adapter uses beyond LoRA, rsLoRA and DoRA.
    """
    config, where = read_config(folder), str(folder / WEIGHTS)
    parts, whole, copies = _tensors(folder, config)
    _require_all_parts(parts, config, folder)
    rule, deltas = _rule(config, _adapted(config, parts, names, folder))
    whole = {**whole, **changed_copies(copies, names, deltas, where)}
    return rule, {**deltas, **require_tied(whole, deltas, names, where)}, _base(folder)


def _tensors(
    folder: Path, config: AdapterConfig
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
            raise unknown_tensor(key, where)
    return parts, whole, copies


def _require_all_parts(
    parts: Mapping[str, Mapping[str, Tensor]], config: AdapterConfig, folder: Path
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
                f"{', '.join(PARTS[part] for part in wanted)} of every adapted module with "
                f"use_dora = {json.dumps(config.use_dora)}"
            )


class _Adapted(NamedTuple):
    """Delta, and the alpha that PEFT scales it by."""

    delta: Delta
    alpha: float


def _adapted(
    config: AdapterConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    names: Collection[str],
    folder: Path,
) -> dict[str, _Adapted]:
    """Deltas by the names of the weights; InputError where their ranks are not what the config
    says.
    """
    known = weight_names(names)
    adapted: dict[str, _Adapted] = {}
    for module, present in parts.items():
        place = place_of(config, module, known)
        rank = of_pattern(config.rank_pattern, place.path, config.r, folder)
        delta = Delta(**present)
        _require_rank(
            delta, rank, is_stacked=bool(place.parameter), where=f"{folder / WEIGHTS}: {module}"
        )
        deltas = {place.weight: delta}
        if place.parameter:
            deltas = experts.unflattened(
                place.parameter, delta.a, delta.b, rank, known.joined[place.parameter]
            )
        alpha = of_pattern(config.alpha_pattern, place.path, config.lora_alpha, folder)
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


def _rule(config: AdapterConfig, adapted: Mapping[str, _Adapted]) -> tuple[Lora, dict[str, Delta]]:
    """Rule that gives every delta the scale that PEFT gives it, and the deltas.

    Where alphas differ so that no rule does, the rest of the scale is folded into b: the forward is
    the same.
    """
    ranks = {name: one.delta.a.shape[-2] for name, one in adapted.items()}
    others = {name: rank for name, rank in ranks.items() if rank != config.r}
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
    is_rooted = not config.use_rslora and all(
        math.isclose(one.alpha, alpha_of(rooted, ranks[name])) for name, one in adapted.items()
    )
    if is_rooted:
        return rooted if others else rule, {name: one.delta for name, one in adapted.items()}

    deltas = {}
    for name, (delta, alpha) in adapted.items():
        rest = alpha / config.lora_alpha
        deltas[name] = delta if rest == 1 else delta._replace(b=rest * delta.b)
    return rule, deltas


def _base(folder: Path) -> Base | None:
    path = folder / ORIGIN
    if not path.is_file():
        return None
    return read_json(path, _Origin, "peft", "remove it to go on without knowing the base").base
