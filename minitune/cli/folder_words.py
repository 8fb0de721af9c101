"""Facts about a model or adapter folder in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitune.cli.folder_facts import (
    TokenizerFiles,
    bits_of,
)
from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.io.safetensors_header import BITS, Entry
from minitune.io.tensor_names import described, is_unmodelled
from minitune.io.units import format_bytes
from minitune.text.folder_files import DEFAULT, TOOL_USE, template_texts

CHATML = ("<|im_start|>", "<|im_end|>")


def tied_head(tied: Any, head: Any) -> str:
    """Yes if the head shares the embedding's weight, by config.json, else by the weights."""
    if tied is None:
        return "no (not said)" if head else "yes (not said)"
    return "yes" if tied else "no"


def not_trained(entries: Mapping[str, Entry]) -> str:
    """Words for tensors that no decoder of text has, which saves of the text model carry."""
    beside = {name: entry for name, entry in entries.items() if is_unmodelled(name)}
    n_bytes = sum(entry.end - entry.start for entry in beside.values())
    return f"{described(beside)}, {format_bytes(n_bytes)}" if beside else ""


def quantization_words(quantization: Any) -> str:
    """Method, format and bits of a quantization_config."""
    if not isinstance(quantization, dict) or not quantization:
        return "no"
    words = [quantization.get(key) for key in ("quant_method", "scheme", "format", "fmt")]
    return f"{' '.join(str(word) for word in words if word) or 'yes'}, {bits_of(quantization)} bits"


def dtypes(entries: Mapping[str, Entry]) -> str:
    """Bytes of tensors by their dtype; nothing where one is unknown."""
    sizes: Counter[str] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.end - entry.start
    if not set(sizes) <= set(BITS):
        return ""
    return ", ".join(f"{dtype} {format_bytes(n)}" for dtype, n in sizes.most_common())


def shape(config: Mapping[str, Any]) -> str:
    """Sizes of a model, as its config.json gives them."""
    words = [
        ("num_hidden_layers", "{} layers"),
        ("hidden_size", "d_model {}"),
        ("num_attention_heads", "{} heads"),
        ("num_key_value_heads", "{} for keys and values"),
        ("head_dim", "d_head {}"),
        ("intermediate_size", "d_ff {}"),
        ("num_experts", "{} experts"),
        ("num_local_experts", "{} experts"),
        ("num_experts_per_tok", "{} a token"),
    ]
    return ", ".join(
        dict.fromkeys(word.format(config[key]) for key, word in words if config.get(key))
    )


def context(config: Mapping[str, Any]) -> str:
    """Positions of a model, its RoPE and its window."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    # nested by the kind of layer
    rope = next((value for value in rope.values() if isinstance(value, dict)), rope)
    kind = rope.get("rope_type") or rope.get("type")
    words = [f"{number(config.get('max_position_embeddings'))} tokens"]
    if kind not in (None, "default"):
        words.append(f"RoPE {kind} x {rope['factor']}" if rope.get("factor") else f"RoPE {kind}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return ", ".join([*words, *([f"window {number(window)}"] if window else [])])


def stops(folder: Path, config: Mapping[str, Any], tokens: TokenizerFiles) -> str:
    """Tokens that end an answer, with their ids."""
    generation = read_json_object(folder / "generation_config.json", "inspect", optional=True)
    stop_ids = sequence(generation.get("eos_token_id", config.get("eos_token_id")))
    texts = {i: text for text, i in tokens.ids.items()}
    return ", ".join(f"{texts.get(i, '')} {i}".strip() for i in stop_ids if isinstance(i, int))


def template_files(folder: Path, tokens: TokenizerFiles) -> str:
    """File that the chat template stands in, and which others there are."""
    try:
        named = {name: Path(text.origin) for name, text in template_texts(folder).items()}
    except InputError as error:
        return f"none that can be read ({error})"
    if not named:
        kind = "ChatML" if all(text in tokens.ids for text in CHATML) else "plain"
        return f"none; the built-in {kind} one is used"
    default = named.pop(DEFAULT).name
    words = [default.partition(" ")[0]]
    for name in sorted(named):
        use = "for conversations with tools" if name == TOOL_USE else "not used"
        words.append(f"{name} {use}")
    return ", ".join(words)


def sequence(value: Any) -> Sequence[Any]:
    """List of a value that may stand alone, or be missing."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def listed(value: Any) -> str:
    """Values with commas between them."""
    return ", ".join(str(one) for one in sequence(value))


def number(value: Any) -> str:
    """Number with commas, or that it is not said."""
    if value is None:
        return "not said"
    return f"{value:,}" if isinstance(value, int) else str(value)


def count(n: int) -> str:
    """Number of parameters, from a million on with a short form behind it."""
    if n >= 10**9:
        return f"{n:,} ({n / 10**9:.2f} billion)"
    if n >= 10**6:
        return f"{n:,} ({n / 10**6:.2f} million)"
    return f"{n:,}"
