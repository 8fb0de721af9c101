"""Vocabulary of a tokenizer.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.text.vocabulary import AddedToken, Vocabulary


def vocabulary_of_spec(path: Path, spec: Mapping[str, Any]) -> Vocabulary:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            f"tokenizer: {path} needs the package tokenizers, which is not installed; pip install 'minitune[hf]'"
        ) from None

    def read(spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the package raises nothing more specific
            raise InputError(f"tokenizer: {path} {error}, expected a tokenizer.json; fetch the file again") from None
        tokenizer.encode_special_tokens = True  # that is: as the plain text that they are here
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    first, bare = read(spec), _without_prefix(spec)
    rest = first if bare == spec else read(bare)
    added = [
        AddedToken(token["content"], token["id"], token["special"], token["lstrip"], token["rstrip"])
        for token in spec.get("added_tokens") or []
    ]
    return Vocabulary(
        size=1 + max(first.get_vocab(with_added_tokens=True).values(), default=-1),
        ids=lambda text, opens: (first if opens else rest).encode(text, add_special_tokens=False).ids,
        text=lambda ids, _: first.decode(ids, skip_special_tokens=False),
        id_of=first.token_to_id,
        added=added,
        names={},
        matches=frozenset(token.text for token in added if not token.special),
        opening=opening_text(spec),
        prefix_everywhere='"type": "Prepend"' in json.dumps(spec) or '"prepend_scheme": "always"' in json.dumps(spec),
    )


def opening_text(spec: Mapping[str, Any]) -> str:
    """The special token that the post-processor of a tokenizer.json puts in front of a text, "" for none."""
    processor = spec.get("post_processor") or {}
    for one in processor.get("processors") or [processor]:
        first = (one.get("single") or [{}])[0] if one.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return ""


def _without_prefix(spec: Any) -> Any:
    """A tokenizer.json without whatever puts a space in front of a text."""
    if isinstance(spec, list):
        return [_without_prefix(child) for child in spec if not (isinstance(child, dict) and child.get("type") == "Prepend")]
    if not isinstance(spec, dict):
        return spec
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    # the vocabulary and its merges are large and hold no rule; a decoder without its prefix would keep the space
    return {
        key: child
        if key in ("model", "decoder", "added_tokens")
        else None
        if isinstance(child, dict) and child.get("type") == "Prepend"
        else off.get(key, _without_prefix(child))
        for key, child in spec.items()
    }
