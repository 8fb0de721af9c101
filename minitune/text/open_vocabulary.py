"""Vocabulary of a folder, from whichever of the three kinds of file it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.text.ranks import ROLES, holds_ranks, ranks_to_spec
from minitune.text.sentencepiece import open_sentencepiece
from minitune.text.tokenizer_json import (
    bos_text_of_spec,
    prefixes_everywhere,
    vocabulary_from_spec,
)
from minitune.text.vocabulary import Vocabulary


def open_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read tokenizer.model if it is sentencepiece's, else tokenizer.json, else Meta's ranks in tokenizer.model.

    config: tokenizer_config.json. InputError names the file that is missing or damaged.
    """
    model = folder / "tokenizer.model"
    fast = folder / "tokenizer.json"
    if model.is_file():
        if holds_ranks(model):
            # Ranks say less than a tokenizer.json, which is read in their place if there is one.
            if not fast.is_file():
                vocabulary = vocabulary_from_spec(model, ranks_to_spec(model))
                return vocabulary._replace(names=ROLES, bos_text=ROLES["bos_token"])
        else:
            vocabulary = _sentencepiece(model, fast, config)
            if vocabulary is not None:
                return vocabulary
    if fast.is_file():
        return vocabulary_from_spec(fast, read_json_object(fast, "tokenizer"))
    raise InputError(
        f"tokenizer: {folder} holds neither file, expected tokenizer.model or tokenizer.json; copy one from the model"
    )


def _sentencepiece(model: Path, fast: Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """Vocabulary of a sentencepiece model; None if a tokenizer.json has to take its place.

    It does if the model is damaged, and if the two disagree about the prefix of text after a token.
    """
    try:
        vocabulary = open_sentencepiece(model, config)
    except (RuntimeError, ValueError, IndexError) as error:  # what sentencepiece raises for damaged bytes
        if fast.is_file():
            return None
        raise InputError(
            f"tokenizer: {model} can't be read by sentencepiece ({error}), expected a sentencepiece model; "
            "put the model's tokenizer.json next to it or fetch the file again"
        ) from None
    family = read_json_object(model.parent / "config.json", "tokenizer", optional=True).get("model_type")
    if not fast.is_file():
        # As in transformers: without a word on it, only Llama's tokenizer leaves the prefix away.
        everywhere = config.get("legacy") is None and family not in (None, "llama")
        return vocabulary._replace(prefix_everywhere=vocabulary.prefix_everywhere or everywhere)
    spec = read_json_object(fast, "tokenizer")
    # Servers read tokenizer.json where it says otherwise; for Llama's family the class decides.
    if family != "llama" and prefixes_everywhere(spec) != vocabulary.prefix_everywhere:
        return None
    # A sentencepiece model does not say whether a text begins with bos: the configuration does, else tokenizer.json.
    if "add_bos_token" not in config:
        return vocabulary._replace(bos_text=bos_text_of_spec(spec))
    return vocabulary
