"""Adapters written as PEFT reads them."""

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from minitune.checkpoint.carried import write_text_files
from minitune.checkpoint.hf_folder import FolderExtras, generation_config_json
from minitune.checkpoint.tensors import save_tensors
from minitune.errors import InputError
from minitune.interop.peft import experts
from minitune.interop.peft.layout import (
    CONFIG,
    EMBEDDING,
    HEAD,
    ORIGIN,
    PARTS,
    PREFIX,
    WEIGHTS,
    Base,
    alpha_of,
    module_name,
)
from minitune.io.atomic import write_json
from minitune.io.results import result_folder
from minitune.lora import Lora
from minitune.models.fused_experts import is_single, n_joined, parameters, places
from minitune.models.hf_multimodal import wrapped_name
from minitune.types import Delta, Trainable


def save_adapter(
    folder: Path,
    trainable: Trainable,
    lora: Lora,
    *,
    base: str,
    fingerprint: str | None,
    quantization: Mapping[str, Any] | None,
    names: Collection[str],
    wrapper: str | None = None,
    extras: FolderExtras | None = None,
) -> None:
    """Write deltas, and tensors trained whole beside them, so that PeftModel.from_pretrained(base
    model, folder) gives the same logits; names: those of all the model's weights; wrapper: the
    model_type of a base that sees images too. InputError as `check` says.

    extras: tokenizer, chat templates and end tokens that the deltas were trained with.

    The scale is always written as alpha / rank, because not every server knows rsLoRA. Deltas of
    single experts are written as such, which servers read too, and PEFT is told of the tensors that
    it will join them to.
    """
    deltas = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Delta)}
    whole = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Tensor)}
    check_adapter(
        {name: delta.a.shape[-2] for name, delta in deltas.items()},
        whole,
        names=names,
        dora=lora.dora,
    )
    within = partial(wrapped_name, wrapper=wrapper)
    # PEFT then wants the shared tensor under both of its names
    tie = EMBEDDING in whole and HEAD not in names
    whole = {**whole, HEAD: whole[EMBEDDING]} if tie else whole
    parameter_of = {
        name: within(path) for name, path in parameters(names).items() if name in deltas
    }
    ranks: dict[str, int] = {}  # by module, and by parameter
    alphas: dict[str, float] = {}
    for name, delta in deltas.items():
        rank = delta.a.shape[-2]
        if name not in parameter_of or is_single(name):
            module = within(module_name(name))
            ranks[module], alphas[module] = rank, alpha_of(lora, rank)
        if name in parameter_of:
            n = n_joined(within(name), parameter_of[name])
            ranks[parameter_of[name]], alphas[parameter_of[name]] = (
                n * rank,
                n * alpha_of(lora, rank),
            )
    default = alpha_of(lora, lora.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": default,
        "rank_pattern": {
            re.escape(place): rank for place, rank in ranks.items() if rank != lora.rank
        },
        "alpha_pattern": {
            re.escape(place): alpha for place, alpha in alphas.items() if alpha != default
        },
        "target_modules": [
            within(module_name(name))
            for name in deltas
            if name not in parameter_of or is_single(name)
        ],
        "target_parameters": list(dict.fromkeys(parameter_of.values())) or None,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        # whole paths, because PEFT takes every module whose path ends so: "norm" would be each
        # layer's norms too
        "modules_to_save": list(dict.fromkeys(within(module_name(name)) for name in whole)) or None,
        "ensure_weight_tying": tie,
        "use_rslora": False,
        "use_dora": lora.dora,
    }
    parts: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        module, stacked = module_name(name), delta.a.ndim == 3
        module = f"{module}.base_layer" if stacked and experts.inner(name, deltas) else module
        leaves = (experts.flattened(name, delta) if stacked else delta)._asdict()
        parts |= {
            f"{module}{PARTS[part]}": leaf
            for part, leaf in leaves.items()
            if isinstance(leaf, Tensor)
        }
    tensors = {f"{PREFIX}{within(name)}": leaf for name, leaf in {**parts, **whole}.items()}
    origin = Base(base, fingerprint, dict(quantization) if quantization is not None else None)
    with result_folder(folder) as aside:
        save_tensors(aside / WEIGHTS, tensors)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / ORIGIN).write_text(
            json.dumps({"base": msgspec.to_builtins(origin)}, indent=2) + "\n", encoding="utf-8"
        )
        if extras is not None:
            write_text_files(aside, extras.tokenizer, extras.template)
            write_json(aside / "generation_config.json", generation_config_json(extras))


def check_adapter(
    ranks: Mapping[str, int], whole: Collection[str], *, names: Collection[str], dora: bool
) -> None:
    """InputError for what PEFT can't hold: a delta and a whole tensor in one module, a part of a
    module that has other parts, a DoRA of what it takes for a parameter, experts that it joins but
    that differ; ranks: of the deltas, by weight.
    """
    modules = {module_name(name) for name in ranks}
    both = next((name for name in whole if module_name(name) in modules), None)
    if both is not None:
        raise InputError(
            f"peft: {both} trains whole and {module_name(both)} has a delta, expected one of them: "
            "PEFT holds no more; save it merged"
        )
    kept = {module_name(name) for name in whole}
    apart = next((name for name in names if module_name(name) in kept and name not in whole), None)
    if apart is not None:
        raise InputError(
            f"peft: {apart} does not train, but another tensor of its module trains whole, "
            "expected both: PEFT keeps modules"
        )
    parameter_of = parameters(names)
    other = next((name for name in whole if parameter_of.get(name, name) != name), None)
    if other is not None:
        raise InputError(
            f"peft: {other} trains whole, which PEFT knows as {parameter_of[other]} alone, "
            "expected a delta on it; save it merged"
        )
    if dora and (name := next((name for name in ranks if name in parameter_of), None)):
        raise InputError(
            f"peft: {name} has a DoRA, expected dora = false: PEFT adapts the feed-forward of a "
            "model with experts without; "
            "narrow the targets, drop dora, or save it merged"
        )
    for path, joined in places(names).items():
        first = joined[0]
        other = next((name for name in joined if ranks.get(name) != ranks.get(first)), None)
        if other is not None:
            has, wanted = describe(ranks.get(other)), describe(ranks.get(first))
            raise InputError(
                f"peft: {other} has {has} and {first} {wanted}, expected one rank for all of "
                f"{path}: PEFT joins "
                "them; change targets or ranks, or save it merged"
            )


def describe(rank: int | None) -> str:
    """Words for the delta of a weight: its rank, or that there is none."""
    return "no delta" if rank is None else f"a delta of rank {rank}"
