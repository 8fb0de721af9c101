"""generation_config.json: which tokens end an answer, as the model's own folder says it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from minitune.errors import InputError
from minitune.io.json_file import read_json
from minitune.io.paths import is_present
from minitune.models.hf_multimodal import text_config
from minitune.models.open import config_json
from minitune.types import PositiveFloat

# What else changes greedy answers of transformers.
OTHER_RULES = (
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "penalty_alpha",
    "num_beams",
)
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


def generation_config(source: Path) -> dict[str, Any]:
    """Content of generation_config.json, or what stands for it: the end tokens of config.json.

    InputError if it is no JSON, or if its end tokens are no token ids.
    """
    path = source / "generation_config.json"
    if not is_present(path):
        path = source / "config.json"
        generation = {"eos_token_id": text_config(config_json(source)).get("eos_token_id")}
    else:
        generation = read_json(path, dict[str, Any], "checkpoint", "download it again")
    _end_ids_of(generation, path)
    return generation


def end_ids(source: Path) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: those of generation_config.json, else of config.json.

    InputError as generation_config raises it.
    """
    generation = generation_config(source)
    if generation.get("eos_token_id") is None:
        generation = text_config(config_json(source))
    return tuple(_end_ids_of(generation, source / "config.json"))


def repetition_penalty(source: Path) -> float:
    """Penalty of repetitions that transformers applies to answers of this folder, 1 for none.

    InputError if it is no number above 0.
    """
    written = generation_config(source).get("repetition_penalty")
    try:
        return msgspec.convert(1.0 if written is None else written, PositiveFloat)
    except msgspec.ValidationError as error:
        place = source / "generation_config.json"
        found = f"checkpoint: {place} repetition_penalty: {error}"
        raise InputError(f"{found}, expected a number above 0; correct it") from None


def other_rules(source: Path) -> list[str]:
    """Fields of generation_config.json by which transformers changes greedy answers of this folder
    and minitune does not.
    """
    generation = generation_config(source)
    idle = (None, False, 0, 1, 1.0, [])
    return [name for name in OTHER_RULES if generation.get(name) not in idle]


def with_end_ids(generation: Mapping[str, Any], more: Sequence[int]) -> dict[str, Any]:
    """Generation config with more end tokens behind those that it has."""
    known = _end_ids_of(generation, Path("generation_config.json"))
    return {**generation, "eos_token_id": [*known, *(i for i in more if i not in known)]}


def _end_ids_of(generation: Mapping[str, Any], path: Path) -> list[int]:
    try:
        ids = msgspec.convert(generation.get("eos_token_id"), TokenId | list[TokenId] | None)
    except msgspec.ValidationError as error:
        expected = "expected a token id or a list of them; correct it"
        raise InputError(f"checkpoint: {path} eos_token_id: {error}, {expected}") from None
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
