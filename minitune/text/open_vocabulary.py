"""Vocabulary of a folder, from whichever of the three kinds of file it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.text.folder_files import model_type
from minitune.text.ranks import ROLES, holds_ranks, ranks_to_spec
from minitune.text.sentencepiece import open_sentencepiece
from minitune.text.tokenizer_json import (
    bos_text_of_spec,
    prefixes_everywhere,
    spec_of_llama,
    vocabulary_from_spec,
)
from minitune.text.vocabulary import Vocabulary

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


def open_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read tokenizer.model if it is sentencepiece's, else tokenizer.json, else Meta's ranks in
    tokenizer.model.

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
        spec = read_json_object(fast, "tokenizer")
        if not model.is_file() and _is_llama(folder, config):
            spec = spec_of_llama(spec, config)
        return vocabulary_from_spec(fast, spec)
    raise InputError(
        f"tokenizer: {folder} holds neither file, expected tokenizer.model or tokenizer.json; "
        "copy one from the model"
    )


def _sentencepiece(model: Path, fast: Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """Vocabulary of a sentencepiece model; None if a tokenizer.json has to take its place.

    It does if the model is damaged, and if the two disagree about the prefix of text after a token.
    """
    family = model_type(model.parent)
    # As in transformers: without a word on it, only Llama's tokenizer leaves the prefix away.
    is_other = family not in (None, "llama") and config.get("legacy") is not False
    try:
        vocabulary = open_sentencepiece(model, config, prefixes_spaces=is_other)
    # what sentencepiece raises for damaged bytes
    except (RuntimeError, ValueError, IndexError) as error:
        if fast.is_file():
            return None
        raise InputError(
            f"tokenizer: {model} can't be read by sentencepiece ({error}), expected a "
            "sentencepiece model; put the model's tokenizer.json next to it or fetch the file again"
        ) from None
    if not fast.is_file():
        return vocabulary._replace(prefix_everywhere=vocabulary.prefix_everywhere or is_other)
    spec = read_json_object(fast, "tokenizer")
    # Servers read tokenizer.json where it says otherwise; for Llama's family the class decides.
    if family != "llama" and prefixes_everywhere(spec) != vocabulary.prefix_everywhere:
        return None
    # A sentencepiece model does not say whether a text begins with bos: the configuration does,
    # else tokenizer.json.
    if "add_bos_token" not in config:
        return vocabulary._replace(bos_text=bos_text_of_spec(spec))
    return vocabulary


def _is_llama(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return True if AutoTokenizer takes the class of Llama's tokenizer for a folder."""
    return model_type(folder) in (None, "llama") and config.get("tokenizer_class") in LLAMA_CLASSES
