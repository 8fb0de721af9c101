"""Model families as llama.cpp knows them: names of tensors and numbers, and what differs."""

import math
from typing import NamedTuple

from minitune.errors import InputError
from minitune.models import rope_scaling
from minitune.models.config import DecoderConfig, layer_kind
from minitune.models.model import Model

ELSEWHERE = "save it as a Hugging Face folder"


class Architecture(NamedTuple):
    """Family of models in llama.cpp, and which parts of a config it reads.

    neighbours: its RoPE rotates dimensions 2i and 2i + 1 of a head; that of Hugging Face's weights
    i and i + half.
    biases: it adds those of the attention's output and of the mlp; those of q, k and v it always
    adds.
    divisors: it reads a divisor for each frequency, which Llama 3's scaling and longrope need.
    square: the heads together are as wide as the model.
    windows: it keeps the windows of sliding layers.
    reads: fields of the config, besides the usual ones, that it reads.
    """

    name: str
    neighbours: bool = False
    biases: bool = False
    divisors: bool = False
    square: bool = False
    windows: bool = False
    reads: tuple[str, ...] = ()


USUAL = (
    *(
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "d_model",
        "d_head",
        "d_ff",
        "vocab_size",
        "norm_eps",
        "max_positions",
    ),
    *(
        "rope_theta",
        "rope_scaling",
        "tie_embeddings",
        "attention_bias",
        "qkv_bias",
        "mlp_bias",
        "layer_types",
        "window",
    ),
)
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_scale", "logit_divisor")
GEMMA = ("attention_scale", "final_cap")
LLAMA = Architecture("llama", neighbours=True, biases=True, divisors=True)
OLMO = Architecture("olmo2", square=True, windows=True, reads=("window_rope_theta",))
ARCHITECTURES = {  # by the name of the family here
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral3": LLAMA._replace(name="mistral3"),
    "qwen2": Architecture("qwen2", square=True),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", windows=True, reads=("attention_cap", *GEMMA)),
    "gemma3_text": Architecture("gemma3", windows=True, reads=("window_rope_theta", *GEMMA)),
    "phi3": Architecture("phi3", divisors=True, square=True, reads=("rotary_factor",)),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "granite": LLAMA._replace(name="granite", reads=MULTIPLIERS),
    "smollm3": Architecture("smollm3", neighbours=True, reads=("rope_layers",)),
}
# Layers at which llama.cpp takes a Gemma for the 27B, whose scores are scaled by d_model / n_heads.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def architecture(model: Model) -> tuple[Architecture, list[str]]:
    """Architecture that computes the same logits, and notes on the lengths up to which it does.

    InputError for a family, a field of the config or a RoPE scaling without a counterpart.
    """
    config, family = model.config, model.family.name
    arch = ARCHITECTURES.get(family)
    if arch is None:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"gguf: a model of {family}, expected one of {known}; {ELSEWHERE}")
    known_fields = {field: getattr(config, field) for field in (*USUAL, *arch.reads)}
    usual = model.family.config(**known_fields)
    for field in config.__struct_fields__:
        value, default = getattr(config, field), getattr(usual, field)
        if value != default:
            which = f"{field} = {value!r} of a {family}, which llama.cpp does not read"
            raise InputError(f"gguf: {which}, expected {default!r}; {ELSEWHERE}")
    odd = _odd(arch, config)
    if odd is not None:
        odd = f"{odd}, which llama.cpp's {arch.name} does not compute"
        raise InputError(f"gguf: a {family} with {odd}; {ELSEWHERE}")
    return arch, _notes(arch, config)


def tensor_name(config: DecoderConfig, name: str) -> str:
    """Name in the file of a weight."""
    module, _, kind = name.rpartition(".")
    if module in TENSORS:
        return f"{TENSORS[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    # One name stands for the norm before the mlp or for the one behind attention.
    after_attention = "ffn_norm" if config.norms == "before" else "post_attention_norm"
    inner = after_attention if inner == "post_attention_layernorm" else TENSORS[inner]
    return f"blk.{layer}.{inner}.{kind}"


def _odd(arch: Architecture, config: DecoderConfig) -> str | None:
    """Property of a config that the architecture has no counterpart for; None if there is none."""
    if config.attention_bias and not arch.biases:
        return "a bias behind attention"
    if config.mlp_bias and not arch.biases:
        return "biases in the mlp"
    if arch.square and config.n_heads * config.d_head != config.d_model:
        return f"{config.n_heads} heads of {config.d_head} in a width of {config.d_model}"
    if arch.name == "gemma" and not config.tie_embeddings:
        return "a head apart from the embedding"
    if arch.name == "olmo2" and config.tie_embeddings:
        return "a head tied to the embedding"
    if arch.name == "smollm3" and [layer_kind(config, i).rope for i in range(config.n_layers)] != [
        i % 4 != 3 for i in range(config.n_layers)
    ]:
        return "RoPE on other layers than three of four"
    if arch.name == "gemma2" and (config.attention_cap is None or config.final_cap is None):
        return "scores or logits that have no cap"
    if arch.name in LAYERS_OF_27B:
        is_27b = config.n_layers == LAYERS_OF_27B[arch.name]
        width = config.d_model // config.n_heads if is_27b else config.d_head
        if not math.isclose(attention_scale(config), width**-0.5, rel_tol=1e-6):
            return f"scores scaled by {attention_scale(config):.4g} on {config.n_layers} layers"
    return _odd_rope(arch, config)


def _odd_rope(arch: Architecture, config: DecoderConfig) -> str | None:
    scaling, theta = config.rope_scaling, config.window_rope_theta
    if arch.name == "olmo2" and theta is not None and theta != config.rope_theta:
        bases = f"{theta:g} on the layers with windows and of {config.rope_theta:g} on others"
        return f"a RoPE base of {bases}"
    has_own_base = "window_rope_theta" not in arch.reads or theta is not None
    if not has_own_base and scaling is not None and "sliding" in layer_attention(config):
        return "a scaled RoPE on the layers with windows"
    if isinstance(scaling, (rope_scaling.Llama3, rope_scaling.LongRope)) and not arch.divisors:
        return f"RoPE scaling {type(scaling).__name__.lower()!r}"
    if not isinstance(scaling, rope_scaling.Yarn):
        return None
    if arch.name == "gemma3":
        return "RoPE scaling 'yarn'"
    if not scaling.truncate:
        return "YaRN whose ramp is not cut to whole dimensions (truncate = false)"
    if arch.name != "mistral3" and (scaling.beta_fast or 32.0, scaling.beta_slow or 1.0) != (
        32.0,
        1.0,
    ):
        turns = f"{scaling.beta_fast or 32.0:g} and {scaling.beta_slow or 1.0:g}"
        return f"YaRN between {turns} turns in place of 32 and 1"
    if arch.name != "mistral3" and scaling.llama_4_scaling_beta is not None:
        return "queries that grow with the position"
    return None


def _notes(arch: Architecture, config: DecoderConfig) -> list[str]:
    """Lengths up to which llama.cpp computes the same logits, where it leaves something out."""
    scaling, notes = config.rope_scaling, []
    if isinstance(scaling, rope_scaling.Dynamic):
        n = config.max_positions
        notes.append(f"dynamic RoPE scaling left out: llama.cpp is right up to {n} tokens")
    if isinstance(scaling, rope_scaling.LongRope):
        n = scaling.original_max_position_embeddings
        when = f"for a context of more than {n} tokens, however short the text"
        notes.append(f"longrope: llama.cpp takes the long factors {when}")
    window = config.window if "sliding" in layer_attention(config) else None
    if window is not None and window < config.max_positions and not arch.windows:
        left_out = f"the window of {window} tokens left out"
        notes.append(f"{left_out}: llama.cpp is right up to {window} tokens")
    return notes


def layer_attention(config: DecoderConfig) -> list[str]:
    """Attention of each layer, by its name in the config."""
    return [layer_kind(config, i).attention for i in range(config.n_layers)]


def attention_scale(config: DecoderConfig) -> float:
    """Factor of the scores."""
    return config.d_head**-0.5 if config.attention_scale is None else config.attention_scale
