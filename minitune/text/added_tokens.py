"""Tokens that a folder declares beside its vocabulary, the roles that they have, and which of them
are special.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.text.vocabulary import NAMED_TOKENS, AddedToken, Vocabulary

MAX_ID = 2**31  # token ids are int32 in files


def token_names(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of tokens by role: the vocabulary's, then the settings', which can also take a role
    away with null.
    """
    names = dict(vocabulary.names)
    for name in NAMED_TOKENS:
        if name in settings:
            names.pop(name, None)
            text = _token_text(settings[name])
            if text:
                names[name] = text
    return names


def added_tokens(
    folder: Path,
    vocabulary: Vocabulary,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, AddedToken]:
    """Added tokens by text, from the vocabulary, the configuration and the roles; the latter are
    special.
    """
    added = {token.text: token for token in vocabulary.added}
    for token in _declared(folder, config):
        # A declaration that gives a token of the vocabulary another id is no use: the embedding has
        # it at the old one.
        if token.text in added or vocabulary.id_of(token.text) in (None, token.id):
            added[token.text] = token
    for text in [*names.values(), *_unnamed_special(settings)]:
        if text in added:
            added[text] = added[text]._replace(special=True)
            continue
        token_id = vocabulary.id_of(text)
        if token_id is not None:
            added[text] = AddedToken(text, token_id, True)
    return added


def _token_text(token: Any) -> str:
    """Text of a token that is written as a string or as an object with content; "" for anything
    else.
    """
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token if isinstance(token, str) else ""


def _unnamed_special(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role: additional_special_tokens, or extra_special_tokens in newer
    folders.
    """
    texts: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = settings.get(key) or []
        texts += [
            _token_text(token)
            for token in (tokens.values() if isinstance(tokens, dict) else tokens)
        ]
    return texts


def _declared(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """Added tokens of added_tokens.json (old folders: all of them special) and of
    tokenizer_config.json.
    """
    path = folder / "tokenizer_config.json"
    old = read_json_object(folder / "added_tokens.json", "tokenizer", optional=True)
    try:
        declared = [AddedToken(text, int(i), True) for text, i in old.items()]
        for i, token in (config.get("added_tokens_decoder") or {}).items():
            flags = [bool(token.get(key)) for key in ("special", "lstrip", "rstrip")]
            declared.append(AddedToken(token["content"], int(i), *flags))
        for token in declared:
            if not 0 <= token.id < MAX_ID:
                raise ValueError(f"{token.text!r} has the id {token.id}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"tokenizer: {path} added_tokens_decoder can't be read ({error!r}), "
            'expected {"id": {"content": text, "special": bool}}; fetch the file again'
        ) from None
    return declared
