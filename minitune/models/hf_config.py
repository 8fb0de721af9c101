"""config.json: how a family spells the numbers of its Config, in the 4.x and the 5.x style of
transformers.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import msgspec

from minitune.errors import InputError, quoted
from minitune.models import hf_fields, hf_quantized, rope_scaling
from minitune.models.config import AttentionType, DecoderConfig, layer_kind

C = TypeVar("C", bound=DecoderConfig)
NONE: Mapping[str, Any] = MappingProxyType({})
NAMES = {  # field of a Config -> field of config.json, in every family
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
REMEDY = "delete what says nothing about the architecture, or is it another family?"
ROPE = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
ATTENTION_TYPES: dict[str, AttentionType] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
MAX_NAMED = 5  # unknown fields that a message names


class HFConfig(NamedTuple):
    """Spelling of a family's config.json, and what it must say there because the decoder does
    nothing else.

    fields: Config field -> config.json field, besides NAMES. required: config.json field -> the
    values that it may have, of which the first is written; accepted: the same, not written.
    defaults: what a missing field means. ignored: fields that the family reads by itself, or that
    say nothing.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str] = NONE
    required: Mapping[str, tuple[Any, ...]] = NONE
    accepted: Mapping[str, tuple[Any, ...]] = NONE
    defaults: Mapping[str, Any] = NONE
    ignored: tuple[str, ...] = ()

    def decoded(self, hf: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Fields of a config.json and the family's defaults, each of its type and none of them
        null.

        InputError for a field that the family does not know, and for a value that it does not have.
        """
        allowed = {**hf_fields.ALLOWED, **self.accepted, **self.required}
        names = {**NAMES, **self.fields}
        hf_quantized.check(hf, self.model_type, where)
        known = {*names.values(), *allowed, *self.ignored}
        known |= {*ROPE, *hf_fields.HARMLESS, *hf_quantized.KEYS}
        unknown = [key for key in hf if key not in known and hf[key] is not None]
        if unknown:
            raise InputError(
                f"models: {where} has {_named(unknown, hf)}, unknown to the {self.model_type} "
                f"family; {REMEDY}"
            )
        for name, values in allowed.items():
            if hf.get(name) is not None and hf[name] not in values:
                expected = f"{name} {values[0]!r}" if values else f"no {name}"
                raise InputError(
                    f"models: {where} has {name!r} = {quoted(hf[name])}, expected {expected}; "
                    f"the {self.model_type} family has no other"
                )
        fields = hf_fields.decoded(hf, where)
        missing = {key: value for key, value in self.defaults.items() if key not in fields}
        if "rope_parameters" in fields:
            missing.pop("rope_scaling", None)  # the same field by its newer name
        return {**missing, **fields}

    def read(self, kind: type[C], hf: Mapping[str, Any], where: str, **read: Any) -> C:
        """Config of the fields that `decoded` gave and of those that the family reads itself."""
        names = {**NAMES, **self.fields}
        if "rotary_factor" not in read and rotary_factor(hf) != 1:
            raise InputError(
                f"models: {where} has partial_rotary_factor {rotary_factor(hf)}, expected 1.0; "
                f"{self.model_type} rotates whole heads"
            )

        # what the file says, by minitune's names
        fields = {field: hf[name] for field, name in names.items() if name in hf}

        # what follows from it where the file says nothing
        n_heads, d_model = fields.get("n_heads"), fields.get("d_model")
        d_head = d_model // n_heads if n_heads and d_model else None
        derived = {"n_kv_heads": n_heads, "d_head": d_head, "norm_eps": 1e-6, "max_positions": 2048}
        if "rope_theta" not in read:
            theta, scaling = rope_scaling.from_hf(hf, where)
            read = {**read, "rope_theta": theta, "rope_scaling": scaling}
        read = {**read, "rope_scaling": msgspec.to_builtins(read["rope_scaling"])}

        required = {field: None for field in NAMES if field != "tie_embeddings"}
        try:
            return msgspec.convert({**required, **derived, **fields, **read}, kind)
        except msgspec.ValidationError as error:
            raise InputError(
                f"models: {where}: {quoted(error)} (in minitune's names for the fields)"
            ) from None

    def write(self, config: DecoderConfig, **written: Any) -> dict[str, Any]:
        """Content of a config.json that transformers 4.x and 5.x read alike, with the fields that
        the family writes by itself.
        """
        names = {**NAMES, **self.fields}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{name: getattr(config, field) for field, name in names.items()},
            **{name: values[0] for name, values in self.required.items()},
            **rope_scaling.to_hf(config.rope_theta, config.rope_scaling),
            **written,
        }


def _named(names: Sequence[str], hf: Mapping[str, Any]) -> str:
    """Fields with their values, of which a message has room for a few."""
    shown = ", ".join(f"{quoted(name)} = {quoted(hf[name])}" for name in names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"


def rotary_factor(hf: Mapping[str, Any]) -> float:
    """Part of each head that RoPE rotates."""
    inner = rope_scaling.rope_parameters(hf).get("partial_rotary_factor")
    return float(hf.get("partial_rotary_factor", 1.0) if inner is None else inner)


def layer_pattern(
    hf: Mapping[str, Any], default: tuple[AttentionType, ...], where: str
) -> tuple[AttentionType, ...]:
    """Pattern of layer_types, and `default` where there are none or where they repeat it."""
    types = hf.get("layer_types")
    if types is None:
        return default
    odd = next((one for one in types if one not in ATTENTION_TYPES), None)
    if odd is not None or len(types) != hf.get("num_hidden_layers"):
        raise InputError(
            f"models: {where} has {len(types)} layer_types, one {quoted(odd)}; expected "
            f"{hf.get('num_hidden_layers')} of {', '.join(ATTENTION_TYPES)}"
        )
    return pattern([ATTENTION_TYPES[one] for one in types], default)


def rope_layers(hf: Mapping[str, Any], where: str) -> list[bool] | None:
    """True for each layer that has RoPE, as no_rope_layers says (1 where it has, whatever the name
    says).
    """
    turned, n_layers = hf.get("no_rope_layers"), hf.get("num_hidden_layers", 0)
    if turned and len(turned) < n_layers:
        raise InputError(
            f"models: {where} has {len(turned)} no_rope_layers, expected {n_layers}; correct it"
        )
    return [bool(x) for x in turned[:n_layers]] if turned else None


def pattern(values: Sequence[Any], default: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shortest beginning that repeats over the values, and `default` if that does."""
    if all(x == default[i % len(default)] for i, x in enumerate(values)):
        return default

    # the longest beginning that is an end too, for every part of the values (Knuth, Morris and
    # Pratt 1977)
    borders = [0]
    for x in values[1:]:
        n = borders[-1]
        while n and values[n] != x:
            n = borders[n - 1]
        borders.append(n + (values[n] == x))
    return tuple(values[: len(values) - borders[-1]])


def layer_types_to_hf(config: DecoderConfig) -> list[str]:
    """Fields that `layer_pattern` reads."""
    names = {attention_type: name for name, attention_type in ATTENTION_TYPES.items()}
    return [names[layer_kind(config, i).attention] for i in range(config.n_layers)]


def layered_rope(hf: Mapping[str, Any], where: str, theta: float, local: float) -> dict[str, Any]:
    """rope_theta, rope_scaling and window_rope_theta, flat (4.x) or by layer type (5.x); InputError
    if windows are scaled.
    """
    nested = hf.get("rope_parameters") or {}
    if "full_attention" not in nested and "sliding_attention" not in nested:
        whole, scaling = rope_scaling.from_hf(hf, where, theta)
        return {
            "rope_theta": whole,
            "rope_scaling": scaling,
            "window_rope_theta": hf.get("rope_local_base_freq", local),
        }
    # transformers lets rope_scaling, which is the older spelling, change the table of full layers
    scaling = hf.get("rope_scaling") or {}
    own = {**(nested.get("full_attention") or {}), **scaling}
    if "type" in scaling and own.get("rope_type", scaling["type"]) != scaling["type"]:
        raise InputError(
            f"models: {where} has rope_scaling of type {quoted(scaling['type'])} beside "
            f"rope_parameters of rope_type {quoted(own['rope_type'])}, which then counts; write "
            "rope_type for type"
        )
    full = {"rope_theta": hf.get("rope_theta", theta), **own}
    near = {
        "rope_theta": hf.get("rope_local_base_freq", local),
        **(nested.get("sliding_attention") or {}),
    }
    near_theta, near_scaling = rope_scaling.one_from_hf(near, hf, where)
    if near_scaling is not None:
        raise InputError(
            f"models: {where} scales RoPE on sliding layers ({near['rope_type']!r}), expected the "
            "default there"
        )
    whole, scaling = rope_scaling.one_from_hf(full, hf, where)
    return {"rope_theta": whole, "rope_scaling": scaling, "window_rope_theta": near_theta}


def layered_rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Fields that `layered_rope` reads, in both spellings."""
    flat = rope_scaling.to_hf(config.rope_theta, config.rope_scaling)
    near = rope_scaling.to_hf(config.window_rope_theta or config.rope_theta, None)[
        "rope_parameters"
    ]
    return {
        **flat,
        "rope_parameters": {"full_attention": flat["rope_parameters"], "sliding_attention": near},
    }


def sliding_after(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """window and layer_types where the first max_window_layers layers are full and the rest see a
    window, if windows are used.
    """
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    n, n_full = hf.get("num_hidden_layers", 0), hf.get("max_window_layers", 28)
    late = pattern(["full" if i < n_full else "sliding" for i in range(n)], ("full",))
    return {
        "window": window,
        "layer_types": layer_pattern(hf, late, where) if window is not None else ("full",),
    }


def sliding_after_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Fields that `sliding_after` reads."""
    types = layer_types_to_hf(config)
    first = next((i for i, one in enumerate(types) if one != "full_attention"), config.n_layers)
    used = config.window is not None
    return {
        "use_sliding_window": used,
        "sliding_window": config.window,
        "max_window_layers": first,
        "layer_types": types,
    }
