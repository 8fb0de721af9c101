"""Models opened from a config.json or a shape file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError, nearest, quoted
from minitune.io import toml
from minitune.io.json_file import read_json
from minitune.io.toml_messages import KeyPath
from minitune.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    llama4,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from minitune.models.family import Family
from minitune.models.hf_multimodal import text_config
from minitune.models.model import Model

FAMILIES = {  # by the model_type of config.json
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "ministral3": ministral3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "phi3": phi3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "granite": granite.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "llama4_text": llama4.FAMILY,
}


def open(folder: Path) -> Model:
    """The model that a Hugging Face folder's config.json describes; InputError for an unknown family or field."""
    return from_hf(config_json(folder), str(folder / "config.json"))


def config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder; InputError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"models: {path} does not exist, expected a Hugging Face folder: config.json, *.safetensors, tokenizer files"
        )
    return read_json(path, dict[str, Any], "models", "download it again")


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Model:
    """The model that a config.json's content describes, without the part that sees images if there is one."""
    hf = text_config(hf)
    family = _family(hf.get("model_type"), where)
    return Model(family, family.from_hf(hf, where))


def open_config(path: Path) -> Model:
    """Model of a shape file: TOML with `family` and that family's Config fields.

    InputError, with the line of the file, for an unknown family or field and for a value of another kind.
    """
    if not path.is_file():
        raise InputError(f"models: {path} does not exist, expected a model shape such as configs/models/llama-3.2-1b.toml")
    text, table = toml.read(path, "models")
    lines = toml.key_lines(text)

    def where(key: KeyPath) -> str:
        return f"models: {path}:{lines[key[:1]]}" if key[:1] in lines else f"models: {path}"

    name = table.pop("family", None)
    if not isinstance(name, str) or name not in FAMILIES:
        said = f"family is {quoted(name)}, {_expected_family(name)}"
        raise InputError(f"{where(('family',))}: {said}")
    return Model(FAMILIES[name], toml.decode(table, FAMILIES[name].config, where))


def _family(name: Any, where: str) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"models: {where} is of family {quoted(name)}, {_expected_family(name)}")
    return FAMILIES[name]


def _expected_family(name: Any) -> str:
    return f"expected one of {', '.join(FAMILIES)}{nearest(quoted(name), [*FAMILIES])}"
