"""Models opened from a config.json or a shape file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError, nearest, quoted
from minitune.io import toml
from minitune.io.foreign_weights import foreign_weights
from minitune.io.json_file import read_json
from minitune.io.paths import is_present
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
    seed_oss,
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
    "seed_oss": seed_oss.FAMILY,
    "granite": granite.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "llama4_text": llama4.FAMILY,
}


def open(folder: Path) -> Model:
    """Model that a Hugging Face folder's config.json describes; InputError for an unknown
    family or field.
    """
    return from_hf(config_json(folder), str(folder / "config.json"))


def config_json(folder: Path) -> dict[str, Any]:
    """Parsed config.json of a model folder; InputError if there is none, or no JSON object."""
    path = folder / "config.json"
    if not is_present(path):
        raise InputError(f"models: {folder_problem(folder)}")
    return read_json(path, dict[str, Any], "models", "download it again")


def folder_problem(folder: Path) -> str:
    """Sentence that says what stands in the place of a model's folder, and what to do about it."""
    expected = "expected a Hugging Face folder: config.json, *.safetensors, tokenizer files"
    if folder.suffix == ".gguf" or next(iter(folder.glob("*.gguf")), None) is not None:
        return f"{folder} is GGUF, {expected}; take the folder that it was made from"
    if folder.is_file():
        return f"{folder} is a file, {expected}; name the folder that holds it"
    if not folder.is_dir():
        return _no_folder(folder, expected)
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, {expected}; name its base as path, and this as deltas"
    foreign = foreign_weights(folder)
    if foreign is not None:
        return f"{folder} holds no config.json, and {foreign[0]}, {expected}; {foreign[1]}"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return (
            f"{folder} holds models in folders of their own, {quoted(inner)}, {expected}; name one"
        )
    names = sorted(path.name for path in folder.iterdir())
    found = f"holds {quoted(names)} and no config.json" if names else "is an empty folder"
    return f"{folder} {found}, {expected}; download or copy it again"


def _no_folder(folder: Path, expected: str) -> str:
    # a name such as Qwen/Qwen3-0.6B, where there is no folder of the first name
    if len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.is_dir():
        fetch = f"python -m minitune download {folder.as_posix()}"
        return f"{folder} does not exist, {expected}; a model of that name is fetched by: {fetch}"
    return f"{folder / 'config.json'} does not exist, {expected}; correct the path"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Model:
    """Model that a config.json's content describes, without the part that sees images if there
    is one.
    """
    hf = text_config(hf)
    family = _family(hf.get("model_type"), where)
    return Model(family, family.from_hf(hf, where))


def open_config(path: Path) -> Model:
    """Model of a shape file: TOML with `family` and that family's Config fields.

    InputError, with the line of the file, for an unknown family or field and for a value of another
    kind.
    """
    if not path.is_file():
        raise InputError(
            f"models: {path} does not exist, expected a model shape such as "
            "configs/models/llama-3.2-1b.toml"
        )
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
