"""Vocabulary of a tokenizer.json, the format of Hugging Face's package tokenizers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.text.vocabulary import AddedToken, Vocabulary

# Settings of normalizers and pre-tokenizers that put a space in front of a text, turned off.
NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never"}
# Parts that hold no such rule: vocabulary and merges are large, and a decoder without its prefix
# would keep the space.
UNTOUCHED = ("model", "decoder", "added_tokens")


def vocabulary_from_spec(path: Path, spec: Mapping[str, Any]) -> Vocabulary:
    """Build the vocabulary that a tokenizer.json's content describes.

    path is named in messages. InputError if the package tokenizers is missing or refuses the
    content.
    """
    # A text inside a document gets no dummy prefix, so it has a tokenizer of its own where the two
    # differ.
    spec_inside = _without_prefix(spec)
    at_start = _tokenizer(path, spec)
    inside = at_start if spec_inside == spec else _tokenizer(path, spec_inside)

    def ids(text: str, starts_document: bool) -> list[int]:
        tokenizer = at_start if starts_document else inside
        return tokenizer.encode(text, add_special_tokens=False).ids

    added = [
        AddedToken(
            token["content"], token["id"], token["special"], token["lstrip"], token["rstrip"]
        )
        for token in spec.get("added_tokens") or []
    ]
    return Vocabulary(
        size=1 + max(at_start.get_vocab(with_added_tokens=True).values(), default=-1),
        ids=ids,
        text=lambda ids, _: at_start.decode(ids, skip_special_tokens=False),
        id_of=at_start.token_to_id,
        added=added,
        names={},
        recognized=frozenset(token.text for token in added if not token.special),
        bos_text=bos_text_of_spec(spec),
        prefix_everywhere=prefixes_everywhere(spec),
    )


def prefixes_everywhere(spec: Mapping[str, Any]) -> bool:
    """Return True if a tokenizer.json puts a space in front of text after an added token too."""
    written = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return '"type": "Prepend"' in written or '"prepend_scheme": "always"' in written


def spec_of_llama(spec: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Content of a tokenizer.json as transformers 5 reads it for Llama's tokenizer.

    Of a tokenizer that came from sentencepiece, the class takes vocabulary and merges alone, and
    has a rule of its own for the space in front of a text: one at its start, or with legacy one
    after each added token too, and none where the text begins with a space. Others, such as those
    on bytes, are as the file says.
    """
    written = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    is_bpe = (spec.get("model") or {}).get("type") == "BPE"
    if not is_bpe or not ('"type": "Prepend"' in written or '"type": "Metaspace"' in written):
        return spec
    scheme = "always" if config.get("legacy") is True else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    metaspace = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": scheme,
        "split": False,
    }
    model = {**spec["model"], "fuse_unk": True, "byte_fallback": True}
    return {**spec, "normalizer": None, "pre_tokenizer": metaspace, "model": model}


def bos_text_of_spec(spec: Mapping[str, Any]) -> str:
    """Special token that the post-processor of a tokenizer.json puts in front of a text, "" for
    none.
    """
    processor = spec.get("post_processor") or {}
    for step in processor.get("processors") or [processor]:
        if step.get("type") == "TemplateProcessing":
            first = (step.get("single") or [{}])[0]
            if "SpecialToken" in first:
                return first["SpecialToken"]["id"]
    return ""


def _tokenizer(path: Path, spec: Mapping[str, Any]) -> Any:
    """tokenizers.Tokenizer of this content, without truncation, padding or special tokens of its
    own.
    """
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            f"tokenizer: {path} needs the package tokenizers, which is not installed; pip install "
            "'minitune[hf]'"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the package raises nothing more specific
        raise InputError(
            f"tokenizer: {path} {error}, expected a tokenizer.json; fetch the file again"
        ) from None
    # The package's name for: the strings of special tokens are encoded as the plain text that they
    # are here.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_prefix(spec: Any) -> Any:
    """Copy a tokenizer.json's content without whatever puts a space in front of a text."""
    if isinstance(spec, list):
        return [_without_prefix(child) for child in spec if not _is_prepend(child)]
    if not isinstance(spec, dict):
        return spec
    copy: dict[str, Any] = {}
    for key, child in spec.items():
        if key in UNTOUCHED:
            copy[key] = child
        elif _is_prepend(child):
            copy[key] = None
        elif key in NO_PREFIX:
            copy[key] = NO_PREFIX[key]
        else:
            copy[key] = _without_prefix(child)
    return copy


def _is_prepend(step: Any) -> bool:
    return isinstance(step, dict) and step.get("type") == "Prepend"
