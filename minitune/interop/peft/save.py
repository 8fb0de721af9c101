"""Adapters written as PEFT reads them."""

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from minitune.checkpoint.carried import write_text_files
from minitune.checkpoint.hf_folder import FolderExtras, generation_config_json
from minitune.checkpoint.tensors import save_tensors
from minitune.interop.peft import experts
from minitune.interop.peft.check import check_adapter
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
from minitune.models.fused_experts import is_single, n_joined, parameter_by_weight
from minitune.models.hf_multimodal import wrapped_name
from minitune.types import Delta, Trainable


def save_adapter(
    folder: Path,
    trainable: Trainable,
    lora: Lora,
    *,
    base: Base,
    names: Collection[str],
    wrapper: str | None = None,
    extras: FolderExtras | None = None,
) -> None:
    """Write deltas, and tensors trained whole beside them, so that PeftModel.from_pretrained(base
    model, folder) gives the same logits. InputError as check_adapter says.

    names: those of all the model's weights. wrapper: the model_type of a base that sees images too.
    extras: tokenizer, chat templates and end tokens that the deltas were trained with.
    """
    deltas = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Delta)}
    whole = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Tensor)}
    ranks = {name: delta.a.shape[-2] for name, delta in deltas.items()}
    check_adapter(ranks, whole, names=names, dora=lora.dora)
    tie = EMBEDDING in whole and HEAD not in names
    if tie:  # PEFT wants the shared tensor under both of its names
        whole = {**whole, HEAD: whole[EMBEDDING]}

    targets = _targets(ranks, lora, names, wrapper)
    modules = [wrapped_name(module_name(name), wrapper) for name in whole]
    config = _config(lora, targets, modules, base=base.path, tie=tie)
    leaves = {**_delta_tensors(deltas), **whole}
    tensors = {f"{PREFIX}{wrapped_name(name, wrapper)}": leaf for name, leaf in leaves.items()}
    with result_folder(folder) as aside:
        save_tensors(aside / WEIGHTS, tensors)
        write_json(aside / CONFIG, config)
        write_json(aside / ORIGIN, {"base": msgspec.to_builtins(base)})
        if extras is not None:
            write_text_files(aside, extras.tokenizer, extras.template)
            write_json(aside / "generation_config.json", generation_config_json(extras))


class _Targets(NamedTuple):
    """Modules and parameters that PEFT adapts, and the rank and alpha of each."""

    modules: list[str]
    parameters: list[str]
    ranks: dict[str, int]
    alphas: dict[str, float]


def _targets(
    ranks: Mapping[str, int], lora: Lora, names: Collection[str], wrapper: str | None
) -> _Targets:
    """PEFT's targets for deltas on weights, given the rank of each.

    Deltas of single experts are modules, which servers read, and PEFT is told of the parameter that
    it will join them to as well.
    """
    within = partial(wrapped_name, wrapper=wrapper)
    parameter_of = parameter_by_weight(names)
    modules: list[str] = []
    adapted: list[str] = []
    place_ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, rank in ranks.items():
        alpha = alpha_of(lora, rank)
        if name not in parameter_of or is_single(name):
            module = within(module_name(name))
            modules.append(module)
            place_ranks[module], alphas[module] = rank, alpha
        if name in parameter_of:
            parameter = within(parameter_of[name])
            n = n_joined(within(name), parameter)
            adapted.append(parameter)
            place_ranks[parameter], alphas[parameter] = n * rank, n * alpha
    return _Targets(modules, list(dict.fromkeys(adapted)), place_ranks, alphas)


def _config(
    lora: Lora, targets: _Targets, modules_to_save: list[str], *, base: str, tie: bool
) -> dict[str, Any]:
    """Content of adapter_config.json.

    The scale is always written as alpha / rank, because not every server knows rsLoRA.
    """
    alpha = alpha_of(lora, lora.rank)
    ranks = {re.escape(place): n for place, n in targets.ranks.items() if n != lora.rank}
    alphas = {re.escape(place): x for place, x in targets.alphas.items() if x != alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": targets.modules,
        "target_parameters": targets.parameters or None,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        # whole paths, because PEFT takes every module whose path ends so: "norm" would be each
        # layer's norms too
        "modules_to_save": list(dict.fromkeys(modules_to_save)) or None,
        "ensure_weight_tying": tie,
        "use_rslora": False,
        "use_dora": lora.dora,
    }


def _delta_tensors(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """Tensors of deltas by PEFT's names for them."""
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        module, is_stacked = module_name(name), delta.a.ndim == 3
        if is_stacked and experts.inner(name, deltas):
            module = f"{module}.base_layer"
        leaves = (experts.flattened(name, delta) if is_stacked else delta)._asdict()
        for part, leaf in leaves.items():
            if isinstance(leaf, Tensor):
                tensors[f"{module}{PARTS[part]}"] = leaf
    return tensors
