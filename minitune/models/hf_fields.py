"""Fields of a config.json: types and bounds of those that count, names of those that say nothing.

A config.json is decoded by these before a family looks at it, so that none can end in a traceback.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from minitune.errors import InputError, quoted

MAX_SIZE = 2**31
MAX_WHOLE = 2.0**53
Size = Annotated[int, Meta(gt=0, le=MAX_SIZE)]
Index = Annotated[int, Meta(ge=0, le=MAX_SIZE)]
LayerCount = Annotated[int, Meta(gt=0, le=10_000)]
AnyNumber = Annotated[float, Meta(ge=-1e30, le=1e30)]
PositiveNumber = Annotated[float, Meta(gt=0.0, le=1e30)]
RopeBase = Annotated[float, Meta(gt=1.0, le=1e30)]
RotatedShare = Annotated[float, Meta(gt=0.0, le=1.0)]


class RopeFields(msgspec.Struct):
    """Fields of rope_parameters and rope_scaling, flat or by layer type, but for a scaling's."""

    rope_theta: RopeBase | None = None
    rope_type: str | None = None
    type: str | None = None
    partial_rotary_factor: RotatedShare | None = None
    full_attention: "RopeFields | None" = None
    sliding_attention: "RopeFields | None" = None
    chunked_attention: "RopeFields | None" = None


class HFFields(msgspec.Struct):
    """Every field that some family reads, by transformers' names; null is absent."""

    num_hidden_layers: LayerCount | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    hidden_size: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size | None = None
    intermediate_size_mlp: Size | None = None
    vocab_size: Size | None = None
    rms_norm_eps: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    qkv_bias: bool | None = None

    # positions
    max_position_embeddings: Size | None = None
    original_max_position_embeddings: Size | None = None
    rope_theta: RopeBase | None = None
    rope_local_base_freq: RopeBase | None = None
    rope_scaling: RopeFields | None = None
    rope_parameters: RopeFields | None = None
    partial_rotary_factor: RotatedShare | None = None
    no_rope_layers: Annotated[list[bool | int], Meta(max_length=10_000)] | None = None
    no_rope_layer_interval: LayerCount | None = None

    # what is attended to
    layer_types: Annotated[list[str], Meta(max_length=10_000)] | None = None
    use_sliding_window: bool | None = None
    sliding_window: Index | None = None  # 0 where it is not used
    sliding_window_pattern: LayerCount | None = None
    _sliding_window_pattern: LayerCount | None = None
    max_window_layers: Index | None = None
    attention_chunk_size: Size | None = None
    use_qk_norm: bool | None = None
    attn_temperature_tuning: bool | int | None = None
    attn_scale: AnyNumber | None = None
    floor_scale: Size | None = None

    # scales
    query_pre_attn_scalar: PositiveNumber | None = None
    attn_logit_softcapping: PositiveNumber | None = None
    final_logit_softcapping: PositiveNumber | None = None
    embedding_multiplier: AnyNumber | None = None
    residual_multiplier: AnyNumber | None = None
    attention_multiplier: AnyNumber | None = None
    logits_scaling: PositiveNumber | None = None

    # mixtures of experts
    num_experts: LayerCount | None = None
    num_local_experts: LayerCount | None = None
    num_experts_per_tok: LayerCount | None = None
    moe_intermediate_size: Size | None = None
    shared_expert_intermediate_size: Size | None = None
    norm_topk_prob: bool | None = None
    decoder_sparse_step: LayerCount | None = None
    interleave_moe_layer_step: LayerCount | None = None
    mlp_only_layers: Annotated[list[Index], Meta(max_length=10_000)] | None = None
    moe_layers: Annotated[list[Index], Meta(max_length=10_000)] | None = None
    swiglu_limit: PositiveNumber | None = None
    swiglu_alpha: PositiveNumber | None = None
    quantization_config: dict[str, Any] | None = None


# a null of these is a value: no window, no cap
NULLABLE = frozenset(
    [
        "sliding_window",
        "attention_chunk_size",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ]
)
# what transformers' base class writes, and other tools, for every kind of model
# fmt: off
HARMLESS = frozenset([
    "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_name_or_path", "_output_attentions", "architectures", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "label2id",
    "length_penalty", "max_length", "max_sequence_length", "min_length", "model_max_length",
    "model_type", "mtp_num_hidden_layers", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_nextn_predict_layers", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
])
# fmt: on
# values that every family must have, because the decoder does nothing else
ALLOWED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention_dropout": (0.0,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_encoder_decoder": (False,),
        "pruned_heads": ({},),
    }
)


def decoded(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a config.json without those that are null, each of its type and within its bounds.

    InputError names the first that is not.
    """
    numbers = {key: _normal(value) for key, value in hf.items()}
    try:
        fields = msgspec.convert(numbers, HFFields)
    except (msgspec.ValidationError, RecursionError) as error:
        remedy = "correct it, or download it again"
        raise InputError(f"models: {where}: {quoted(error)}; {remedy}") from None
    read = {key: value for key, value in numbers.items() if value is not None or key in NULLABLE}
    typed = {key: getattr(fields, key) for key in fields.__struct_fields__ if key in read}
    tables = {key: read[key] for key in ("rope_scaling", "rope_parameters") if key in read}
    return {**read, **typed, **tables}  # tables of RoPE as they are, with the fields of a scaling


def _normal(value: Any, depth: int = 3) -> Any:
    """Value with whole numbers as integers (some files say 8192.0), tables without nulls."""
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_WHOLE:
        return int(value)
    if isinstance(value, dict) and depth > 0:
        return {key: _normal(inner, depth - 1) for key, inner in value.items() if inner is not None}
    return value
