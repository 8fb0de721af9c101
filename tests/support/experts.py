"""Small random mixtures of experts, and how transformers keeps their weights in memory."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from hypothesis import strategies as st
from torch import Tensor

from minitune import models
from minitune.models.experts import Experts
from minitune.models.rope_scaling import Llama3, Yarn

WITH_EXPERTS = tuple(
    sorted(
        name
        for name, family in models.FAMILIES.items()
        if any(field.name == "experts" and field.required for field in msgspec.structs.fields(family.config))
    )
)
ONE_WIDTH = ("gpt_oss", "mixtral", "olmoe")  # intermediate_size is that of the experts
NO_HEAD_DIM = ("olmoe", "qwen2_moe")  # head_dim is no field of theirs


def expert_config(draw: Callable[..., Any], name: str, fields: dict[str, Any]) -> Any:
    """A Config of a family with experts, with every choice that its config.json has; fields: those that all families have."""

    def pattern(default: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
        n = fields["n_layers"]
        drawn = draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
        shortest = next(p for p in (drawn[:k] for k in range(1, n + 1)) if all(x == p[i % len(p)] for i, x in enumerate(drawn)))
        return default if drawn == [default[i % len(default)] for i in range(n)] else tuple(shortest)

    n_experts = draw(st.integers(2, 5))
    experts: dict[str, Any] = {
        "n_experts": n_experts,
        "n_active": draw(st.integers(1, n_experts)),
        "d_ff": draw(st.sampled_from([3, 7])),
        "names": {"mixtral": "mixtral", "gpt_oss": "gpt_oss", "llama4_text": "llama4"}.get(name, "qwen"),
    }
    window = draw(st.sampled_from([None, 1, 3, 8]))
    if name in ("qwen2_moe", "qwen3_moe"):
        fields["window"] = window
    if name in ("qwen2_moe", "qwen3_moe", "olmoe"):
        experts["renormalised"] = draw(st.booleans())
    if name in ("qwen2_moe", "qwen3_moe"):
        experts["layers"] = pattern((True,), (True, False))
    if name == "qwen2_moe":
        experts |= {"d_shared": draw(st.sampled_from([2, 9])), "shared_gate": True}
        if window is not None:
            fields["layer_types"] = pattern(("full",), ("full", "sliding"))
    if name == "gpt_oss":
        experts |= {"router": "top_then_softmax", "bias": True, "limit": draw(st.sampled_from([0.3, 7.0])), "slope": 1.3}
        fields |= {"window": window or 5, "rope_scaling": Yarn(4.0, 13, beta_fast=32.0, beta_slow=1.0, truncate=False)}
        fields["layer_types"] = pattern(("sliding", "full"), ("full", "sliding"))
    if name == "llama4_text":
        experts |= {"router": "top_then_sigmoid", "d_shared": experts["d_ff"], "layers": pattern((True,), (True, False))}
        fields |= {
            "chunk": window or 5,
            "qk_norm": draw(st.sampled_from(["none", "rotated"])),
            "nope_span": draw(st.integers(1, 9)),
        }
        fields["nope_growth"] = draw(st.sampled_from([None, 0.7]))
        fields["rope_layers"] = pattern((True, True, True, False), (True, False))
        fields["layer_types"] = pattern(("chunked", "chunked", "chunked", "full"), ("chunked", "full"))
        fields["rope_scaling"] = draw(st.sampled_from([None, Llama3(8.0, 1.0, 4.0, 13)]))
    if name in ONE_WIDTH:
        fields["d_ff"] = experts["d_ff"]
    if name in NO_HEAD_DIM:
        fields["d_model"] = fields["n_heads"] * fields["d_head"]
    return models.FAMILIES[name].config(**fields, **declared(draw, name, fields), experts=Experts(**experts))


def declared(draw: Callable[..., Any], name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the switches and numbers that a family's declaration spells in config.json and `fields` does not hold yet."""
    family, drawn = models.FAMILIES[name], {}
    for field in msgspec.structs.fields(family.config):
        if field.name in family.hf.fields and field.name not in fields:
            if isinstance(field.default, bool):
                drawn[field.name] = draw(st.booleans())
            elif isinstance(field.default, float):
                drawn[field.name] = draw(st.sampled_from([0.5, 1.0, 1.7]))
            elif field.name == "window":
                drawn["window"] = draw(st.sampled_from([None, 1, 3, 8]))
    return drawn


def small_experts(name: str) -> Any:
    """One fixed Config of a family with experts, in which every mechanism that it has shows."""
    experts = {
        "mixtral": Experts(5, 2, 7, "mixtral"),
        "qwen2_moe": Experts(5, 2, 7, "qwen", renormalised=False, d_shared=9, shared_gate=True, layers=(False, True)),
        "qwen3_moe": Experts(5, 2, 7, "qwen", layers=(True, False)),
        "olmoe": Experts(5, 2, 7, "qwen", renormalised=False),
        "llama4_text": Experts(5, 2, 7, "llama4", "top_then_sigmoid", d_shared=7, layers=(True, False)),
        "gpt_oss": Experts(5, 2, 7, "gpt_oss", "top_then_softmax", bias=True, limit=0.5),
    }.get(name, Experts(5, 2, 7, "qwen"))
    more: dict[str, Any] = {"window": 5} if name in ("mixtral", "qwen3_moe", "gpt_oss") else {}
    more |= {"rope_scaling": Yarn(4.0, 13, truncate=False)} if name == "gpt_oss" else {}
    if name == "llama4_text":
        more = {"chunk": 5, "nope_growth": 0.7, "nope_span": 4, "layer_types": ("chunked", "full"), "rope_layers": (True, False)}
    fields = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "vocab_size": 17, "norm_eps": 1e-2, "rope_theta": 100.0,
              "max_positions": 64, "d_model": 24 if name in NO_HEAD_DIM else 12, "d_ff": 7 if name in ONE_WIDTH else 13,
              "experts": experts, **more}  # fmt: skip
    return models.FAMILIES[name].config(**fields)


def fused(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers, which keeps all experts of a layer in one tensor and calls every mixture mlp."""
    stacks: dict[str, list[Tensor]] = {}
    state = {}
    for name, w in params.items():
        name = name.replace("block_sparse_moe", "mlp")
        expert = re.fullmatch(r"(.*experts)\.\d+\.(\w+)\.weight", name)
        if expert is None:
            state[name] = w
        else:
            key = f"{expert[1]}.{expert[2]}"
            stacks[key] = [*stacks.get(key, []), w]
    for name, each in stacks.items():
        prefix, _, part = name.rpartition(".")
        if part in ("w2", "down_proj"):
            state[f"{prefix}.down_proj"] = torch.stack(each)
        elif part in ("w1", "gate_proj"):
            up = stacks[f"{prefix}.{'w3' if part == 'w1' else 'up_proj'}"]
            state[f"{prefix}.gate_up_proj"] = torch.cat([torch.stack(each), torch.stack(up)], dim=1)
    return state
