"""Folders of models that also see images: the text model within them, which alone is read, trained
and written.
"""

from collections.abc import Mapping
from typing import Any

from minitune.io import tensor_names

WRAPPERS = {
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "llama4": "Llama4ForCausalLM",
}
PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
# fields that the outer config.json decides
OUTER = ("tie_word_embeddings", "quantization_config", "quantization")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARED = (*TOKEN_IDS, "dtype", "torch_dtype", "transformers_version", *OUTER)


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json for the text model alone; of a folder without images, what it is."""
    inner, kind = hf.get("text_config"), hf.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS or not isinstance(inner, Mapping):
        return dict(hf)
    shared = {key: hf[key] for key in SHARED if hf.get(key) is not None}
    architecture = (
        "Ministral3ForCausalLM" if inner.get("model_type") == "ministral3" else WRAPPERS[kind]
    )
    said = {key: value for key, value in inner.items() if value is not None or key not in shared}
    decided = {key: shared[key] for key in OUTER if key in shared}
    return {**shared, **said, **decided, "architectures": [architecture]}


def text_name(name: str) -> str | None:
    """Name of a stored tensor in the text model alone; None for one that no text model has."""
    if tensor_names.is_unmodelled(name):
        return None
    name = tensor_names.unwrapped(name)
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def wrapped_name(name: str, wrapper: str | None) -> str:
    """Name that transformers gives a weight or module of the text model within a wrapper, by the
    wrapper's model_type; of other models, its name.
    """
    if wrapper == "llama4":
        return f"language_model.{name}"
    if wrapper in WRAPPERS and name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name
