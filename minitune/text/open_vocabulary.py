"""Vocabulary of a folder, from whichever of the three kinds of file it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.text.ranks import ROLES, holds_ranks, spec_of_ranks
from minitune.text.sentencepiece import open_sentencepiece
from minitune.text.tokenizer_json import opening_text, vocabulary_of_spec
from minitune.text.vocabulary import Vocabulary, json_object


def open_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read tokenizer.model (sentencepiece, or Meta's ranks where no tokenizer.json says more), else tokenizer.json.

    config: tokenizer_config.json. InputError names the file that is missing or damaged.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file() and not (fast.is_file() and holds_ranks(model)):
        if holds_ranks(model):
            return vocabulary_of_spec(model, spec_of_ranks(model))._replace(names=ROLES, opening=ROLES["bos_token"])
        try:
            vocabulary = open_sentencepiece(model, config)
            asked = fast.is_file() and "add_bos_token" not in config
            return vocabulary._replace(opening=opening_text(json_object(fast))) if asked else vocabulary
        except (RuntimeError, ValueError, IndexError) as error:  # what sentencepiece raises for damaged bytes
            if not fast.is_file():
                raise InputError(
                    f"tokenizer: {model} can't be read by sentencepiece ({error}), expected a sentencepiece model; "
                    "put the model's tokenizer.json next to it or fetch the file again"
                ) from None
    if fast.is_file():
        return vocabulary_of_spec(fast, json_object(fast))
    raise InputError(
        f"tokenizer: {folder} holds neither file, expected tokenizer.model or tokenizer.json; copy one from the model"
    )
