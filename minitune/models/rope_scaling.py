"""Rotary frequencies and the ways in which checkpoints stretch them to longer contexts."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor

from minitune.errors import InputError, quoted
from minitune.hardware import to_device

Factor = Annotated[float, Meta(gt=0.0, le=1e6)]
Share = Annotated[float, Meta(ge=0.0, le=1e6)]
Context = Annotated[int, Meta(gt=1, le=2**31)]  # tokens


class LinearScaling(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="linear", tag_field="rope_type"
):
    """Every frequency divided by factor (Chen et al. 2023, arXiv 2306.15595, eq. 4)."""

    factor: Factor  # how many times as long the context becomes


class Dynamic(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="dynamic", tag_field="rope_type"
):
    """Base that grows once the length exceeds the trained one (Peng et al. 2023, arXiv
    2309.00071, section 3.3).
    """

    factor: Annotated[float, Meta(ge=1.0, le=1e6)]  # by which the base grows with the length


class Llama3(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="llama3", tag_field="rope_type"
):
    """Low frequencies divided by factor, high ones kept, a ramp between (Llama 3.1; as published
    with its weights).
    """

    factor: Factor  # divisor of the low frequencies
    # full turns within the original context: below this many a frequency is low
    low_freq_factor: Factor
    high_freq_factor: Factor  # and above this many it is high
    original_max_position_embeddings: Context  # tokens that the model was first trained on


class Yarn(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag="yarn",
    tag_field="rope_type",
):
    """As Llama3 with the ramp over dimensions, cos and sin longer by 0.1 ln(factor) + 1 (Peng et
    al. 2023, arXiv 2309.00071, sections 3.2 and 3.4). llama_4_scaling_beta: queries grow by 1 +
    beta ln(1 + floor(position / original)) (Ministral 3).
    """

    factor: Factor  # divisor of the low frequencies
    original_max_position_embeddings: Context  # tokens that the model was first trained on
    # factor of cos and sin; 0.1 ln(factor) + 1 if absent, or what mscale says
    attention_factor: Factor | None = None
    beta_fast: Factor | None = None  # full turns from which on a frequency is kept; 32 if absent
    beta_slow: Factor | None = None  # full turns below which it is divided; 1 if absent
    # with mscale_all_dim: cos and sin are longer by (0.1 mscale ln(factor) + 1) over the same of
    # mscale_all_dim
    mscale: Share | None = None
    mscale_all_dim: Share | None = None  # see mscale
    truncate: bool = True  # the ramp begins and ends at whole dimensions
    llama_4_scaling_beta: Share | None = None  # beta of the growth of queries; none if absent


class LongRope(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag="longrope",
    tag_field="rope_type",
):
    """Divisor for every frequency, one list up to the original context and one beyond (Ding et
    al. 2024, arXiv 2402.13753).
    """

    short_factor: tuple[Factor, ...]  # divisors of texts up to the original context
    long_factor: tuple[Factor, ...]  # divisors of longer texts
    original_max_position_embeddings: Context  # tokens that the model was first trained on
    factor: Factor | None = None  # max_positions over the original context if absent
    # factor of cos and sin; sqrt(1 + ln(factor) / ln(original context)) if absent
    attention_factor: Factor | None = None


Scaling = LinearScaling | Dynamic | Llama3 | Yarn | LongRope
BY_LENGTH = Dynamic | LongRope  # scalings that depend on how long the text is
OLD_NAMES = {"su": "longrope"}
# fields that are no part of a scaling, or that transformers passes over
PASSED_OVER = ("partial_rotary_factor", "max_position_embeddings", "finetuned", "attn_factor")
STRETCHED = ("llama3", "yarn", "longrope")  # that know the context before stretching


def frequencies(
    d_rotary: int,
    theta: float,
    scaling: Scaling | None,
    length: int | Int[Tensor, "*rows"],
    max_positions: int,
) -> Float[Tensor, "... half"]:
    """theta^(-2i / d_rotary) for i < d_rotary / 2, in radians a token, then scaled.

    length: tokens of the text, or of each token's own text; it matters to BY_LENGTH only.
    """
    powers = torch.arange(0, d_rotary, 2, dtype=torch.float32) / d_rotary
    if isinstance(scaling, Dynamic):
        lengths = torch.as_tensor(length).clamp(min=max_positions)[..., None].float()
        stretch = scaling.factor * lengths / max_positions - (scaling.factor - 1)
        return 1.0 / (theta * stretch ** (d_rotary / (d_rotary - 2))) ** to_device(
            powers, lengths.device
        )
    f = 1.0 / theta**powers
    if isinstance(scaling, LinearScaling):
        return f / scaling.factor
    if isinstance(scaling, Llama3):
        # full turns within the original context
        turns = scaling.original_max_position_embeddings * f / (2 * math.pi)
        ramp = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        ramp = ramp.clamp(0.0, 1.0)
        return (1 - ramp) * f / scaling.factor + ramp * f
    if isinstance(scaling, Yarn):
        return _yarn(f, d_rotary, theta, scaling)
    if isinstance(scaling, LongRope):
        lengths = torch.as_tensor(length)[..., None]
        long, short = (
            to_device(f / torch.tensor(x, dtype=f.dtype), lengths.device)
            for x in (scaling.long_factor, scaling.short_factor)
        )
        return torch.where(lengths > scaling.original_max_position_embeddings, long, short)
    return f


def border(scaling: Scaling | None) -> int | None:
    """Length in tokens beyond which all angles of a text change at once, None if there is none.

    Cached keys of a text that grows beyond it do not fit its new queries. Dynamic changes angles
    too, but its cached keys keep theirs, as in transformers.
    """
    return scaling.original_max_position_embeddings if isinstance(scaling, LongRope) else None


def magnitude(scaling: Scaling | None, max_positions: int) -> float:
    """Factor of cos and sin: 1, but for yarn and longrope."""
    if isinstance(scaling, (Yarn, LongRope)) and scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, Yarn) and scaling.mscale and scaling.mscale_all_dim:
        return _growth(scaling.factor, scaling.mscale) / _growth(
            scaling.factor, scaling.mscale_all_dim
        )
    if isinstance(scaling, Yarn):
        return _growth(scaling.factor, 1.0)
    if isinstance(scaling, LongRope):
        original = scaling.original_max_position_embeddings
        factor = scaling.factor or max_positions / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0


def query_scale(
    scaling: Scaling | None, positions: Int[Tensor, "b T"]
) -> Float[Tensor, "b T"] | None:
    """Factor of the queries of each position, None for 1 everywhere."""
    if not isinstance(scaling, Yarn) or scaling.llama_4_scaling_beta is None:
        return None
    return 1 + scaling.llama_4_scaling_beta * torch.log(
        1 + torch.floor(positions / scaling.original_max_position_embeddings)
    )


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Table of RoPE that counts: rope_scaling, else rope_parameters, as in transformers 5."""
    return dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})


def from_hf(
    hf: Mapping[str, Any], where: str, theta: float = 10000.0
) -> tuple[float, Scaling | None]:
    """(theta, scaling) from the fields of a config.json.

    They are in the 4.x spelling (rope_theta, rope_scaling) or the 5.x one (rope_parameters); theta
    is what a missing rope_theta means. InputError where rope_scaling hides a base or a rotated part
    that rope_parameters alone says: transformers would lose it without a word.
    """
    rope = rope_parameters(hf)
    for name, default in (("rope_theta", theta), ("partial_rotary_factor", 1.0)):
        hidden = (hf.get("rope_parameters") or {}).get(name)
        if hidden not in (None, default) and name not in rope and name not in hf:
            raise InputError(
                f"models: {where} has rope_scaling, which says no {name}, beside rope_parameters "
                f"with {name} {hidden}, which then does not count; write {name} into rope_scaling"
            )
    if (
        rope.get("rope_type", rope.get("type")) in STRETCHED
        and "original_max_position_embeddings" in hf
    ):
        rope = {**rope, "original_max_position_embeddings": hf["original_max_position_embeddings"]}
    return one_from_hf({"rope_theta": hf.get("rope_theta", theta), **rope}, hf, where)


def one_from_hf(
    table: Mapping[str, Any], hf: Mapping[str, Any], where: str
) -> tuple[float, Scaling | None]:
    """(theta, scaling) of one table of rope parameters, within the fields of its config.json."""
    rope = {key: value for key, value in table.items() if key not in PASSED_OVER}
    theta, old_name = float(rope.pop("rope_theta")), rope.pop("type", "default")
    kind = rope.get("rope_type", old_name)
    kind = OLD_NAMES.get(kind, kind)
    if kind == "default":
        return theta, None
    if kind in STRETCHED:
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if kind == "dynamic":  # whose original context is max_position_embeddings
        rope.pop("original_max_position_embeddings", None)
    try:
        return theta, msgspec.convert({**rope, "rope_type": kind}, Scaling)
    except msgspec.ValidationError as error:
        raise InputError(
            f"models: {where} rope scaling {quoted(kind)}: {quoted(error)}; "
            "known are default, linear, dynamic, llama3, yarn and longrope"
        ) from None


def to_hf(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """Both spellings at once: what 4.x and 5.x of transformers read alike."""
    # lists, where to_builtins leaves tuples
    scaled = msgspec.json.decode(msgspec.json.encode(scaling))
    return {
        "rope_theta": theta,
        "rope_scaling": scaled,
        "rope_parameters": {"rope_theta": theta, **(scaled or {"rope_type": "default"})},
    }


def _yarn(f: Tensor, d_rotary: int, theta: float, scaling: Yarn) -> Tensor:
    def dim(turns: float) -> float:
        """Dimension that makes so many full turns within the original context."""
        wavelength = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return d_rotary * math.log(wavelength) / (2 * math.log(theta))

    low, high = dim(scaling.beta_fast or 32.0), dim(scaling.beta_slow or 1.0)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_rotary - 1)
    ramp = ((torch.arange(len(f), dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(
        0.0, 1.0
    )
    return f / scaling.factor * ramp + f * (1 - ramp)


def _growth(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
