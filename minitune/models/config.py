"""Numbers that a decoder is made of, and what sets one of its layers apart from another."""

import math
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from minitune.models import rope_scaling as models_rope_scaling
from minitune.models.experts import Experts
from minitune.nn.elementwise import Norm
from minitune.types import PositiveInt

# of each head, of all heads together; of each after RoPE, no weight
QKNorm = Literal["none", "head", "projection", "rotated"]
NormPlacement = Literal["before", "after", "both"]  # of attention and of the mlp
Activation = Literal["silu", "gelu_tanh"]
EmbeddingMultiplier = float | Literal["sqrt_d_model"]
# the dimensions that RoPE rotates together: i and i + half; 2i and 2i + 1
RopeLayout = Literal["half", "interleaved"]
# which earlier tokens are attended to: all, the last, those of a chunk
AttentionType = Literal["full", "sliding", "chunked"]
MixerName = Literal["grouped_query"]


MAX_ELEMENTS = 2**48  # of one weight
MAX_EXPERTS = 200_000  # of all layers


class DecoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers that a decoder is made of; the patterns mixers, layer_types and rope_layers repeat
    over depth.
    """

    n_layers: Annotated[int, Meta(gt=0, le=10_000)]  # decoder blocks
    n_heads: PositiveInt  # heads of the queries
    n_kv_heads: PositiveInt  # heads of keys and values; n_heads is a multiple of it
    d_model: PositiveInt  # numbers that stand for a token between the blocks
    d_head: PositiveInt  # numbers of a head
    d_ff: PositiveInt  # numbers between the two linear maps of the feed-forward
    vocab_size: PositiveInt  # rows of the embedding: at least as many as the tokenizer has tokens
    norm_eps: float = 1e-5  # added to the mean square in every RMS norm
    rope_theta: float = 10000.0  # base of RoPE's frequencies: more tells more positions apart
    # how the frequencies are stretched to a longer context; not at all if absent
    rope_scaling: models_rope_scaling.Scaling | None = None
    tie_embeddings: bool = False  # the head is the embedding, and no weight of its own
    # tokens of a text that the model is made for; more are said, and not refused
    max_positions: PositiveInt = 2048
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False  # biases on gate, up and down

    qkv_bias: bool = False  # biases on q, k, v alone
    fused: bool = False  # q, k, v in one weight, and gate, up in another
    # where the weight of a norm comes in: after the cast back to the dtype of the input, before
    # it, or before it as 1 + w
    norm: Norm = "w_after_cast"
    norms: NormPlacement = "before"  # place of the norms: before attention and mlp, after, or both
    # RMS norm of queries and keys: none, of each head, of all heads together ("projection"), or of
    # each head after RoPE and without a weight ("rotated")
    qk_norm: QKNorm = "none"
    activation: Activation = "silu"  # of the gate in the feed-forward
    # factor of the embedded tokens: a number, or the root of d_model
    embedding_multiplier: EmbeddingMultiplier = 1.0
    residual_multiplier: float = 1.0  # factor of what attention and mlp add
    attention_scale: float | None = None  # factor of the scores; d_head^-0.5 if absent
    attention_cap: float | None = None  # c: scores become c tanh(score / c); as they are if absent
    logit_divisor: float = 1.0  # what the logits are divided by
    final_cap: float | None = None  # c: logits become c tanh(logit / c); as they are if absent
    # pattern over depth: what mixes tokens in each layer
    mixers: tuple[MixerName, ...] = ("grouped_query",)
    # pattern over depth: a layer attends to all earlier tokens, to the last `window` of them, or to
    # those of its chunk
    layer_types: tuple[AttentionType, ...] = ("full",)
    window: PositiveInt | None = None  # tokens of a sliding layer; all if absent
    chunk: PositiveInt | None = None  # tokens of a chunk
    rope_layers: tuple[bool, ...] = (True,)  # pattern over depth: which layers rotate positions
    # the part of each head's dimensions, from the first, that RoPE rotates
    rotary_factor: float = 1.0
    # rope_theta of sliding layers, which are then unscaled; RoPE as on the others if absent
    window_rope_theta: float | None = None
    rope_in_float32: bool = False  # angles are applied in float32, and then cast back
    # dimensions that RoPE rotates together: i and i + half, or neighbours (2i and 2i + 1)
    rope_layout: RopeLayout = "half"
    # g: queries of layers without RoPE grow by 1 + g ln(1 + floor((p + 1) / nope_span)) at position
    # p; not at all if absent
    nope_growth: float | None = None
    nope_span: PositiveInt = 8192  # tokens, of nope_growth
    # mixture of experts in place of the feed-forward, on the layers that it says
    experts: Experts | None = None
    sinks: bool = False  # one more score a head, learned, whose weight goes nowhere

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.d_rotary % 2:
            what = f"d_head {self.d_head}"
            if self.rotary_factor != 1:
                what = f"int({self.rotary_factor} * {what})"
            raise ValueError(f"{what} is odd, expected an even number: RoPE rotates pairs")
        if not (self.mixers and self.layer_types and self.rope_layers):
            raise ValueError(
                "mixers, layer_types or rope_layers is empty, expected a pattern such as ['full']"
            )
        if isinstance(self.rope_scaling, models_rope_scaling.LongRope):
            n_factors = {len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)}
            if n_factors != {self.d_rotary // 2}:
                raise ValueError(
                    f"longrope has lists of {sorted(n_factors)} factors, expected "
                    f"{self.d_rotary // 2} in each"
                )

    def _check_sizes(self) -> None:
        """ValueError for a model that no machine holds, before anything counts up its weights."""
        n_heads = self.n_heads + 2 * self.n_kv_heads
        largest = self.d_model * max(self.vocab_size, 2 * self.d_ff, n_heads * self.d_head)
        n_experts = 1
        if self.experts is not None:
            n_experts = self.experts.n_experts
            largest = max(largest, 2 * n_experts * self.d_model * self.experts.d_ff)
        if largest > MAX_ELEMENTS:
            raise ValueError(f"a weight has {largest:,} elements, expected at most 2^48")
        if self.n_layers * n_experts > MAX_EXPERTS:
            raise ValueError(f"the layers have more than {MAX_EXPERTS:,} experts together")
        for name in ("norm_eps", "rope_theta", "rotary_factor", "logit_divisor"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}, expected a finite number of at least 0")

    @property
    def d_rotary(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return int(self.d_head * self.rotary_factor)

    @property
    def mlp(self) -> str:
        """Name that the weights of a plain mlp begin with."""
        return "mlp" if self.experts is None else self.experts.mlp


class LayerKind(NamedTuple):
    """Choices that set a layer's mixer apart from another's; layers of one kind share their inputs,
    such as angles and masks.
    """

    mixer: MixerName
    attention: AttentionType
    rope: bool


def layer_kind(config: DecoderConfig, i: int) -> LayerKind:
    """Kind of layer i."""
    return LayerKind(
        config.mixers[i % len(config.mixers)],
        config.layer_types[i % len(config.layer_types)],
        config.rope_layers[i % len(config.rope_layers)],
    )


def layer_kinds(config: DecoderConfig) -> list[LayerKind]:
    """Every kind of layer that the model has, once, in the order of its first layer."""
    return list(dict.fromkeys(layer_kind(config, i) for i in range(config.n_layers)))
