"""Vocabulary of a sentencepiece model."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minitune.text.vocabulary import AddedToken, Vocabulary

# Protobuf merges a message field that comes twice: these bytes after a sentencepiece model set, in normalizer_spec
# (field 3), add_dummy_prefix (field 3) and remove_extra_whitespaces (field 4) to false.
NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"
USER_DEFINED = 4  # the type of a piece in a sentencepiece model


def open_sentencepiece(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    proto = path.read_bytes()
    if not proto:  # sentencepiece takes an empty file for an empty model
        raise RuntimeError("an empty file")
    first, rest = SentencePieceProcessor(model_proto=proto), SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
    if config.get("add_prefix_space") is False:
        first = rest
    size = first.vocab_size()
    pieces = [first.id_to_piece(i) for i in range(size)]
    control = [i for i in range(size) if first.is_control(i)]
    user_defined = [i for i, kind in enumerate(_kinds(proto)) if kind == USER_DEFINED]
    squeezes = _squeezes(proto)  # runs of spaces to one, and none at the ends: then every stretch opens with a dummy prefix
    # added_tokens_decoder says which of them are special; without it, those are that look like markup
    declared = "added_tokens_decoder" in config

    def text(ids: list[int], added: Mapping[int, str]) -> str:
        runs = [(found, list(run)) for found, run in groupby(ids, lambda i: i in added)]
        words = [
            "".join(added[i] for i in run) if found else (first if n == 0 else rest).decode([i for i in run if i < size])
            for n, (found, run) in enumerate(runs)
        ]
        return "".join(words)

    def id_of(piece: str) -> int | None:
        i = first.piece_to_id(piece)
        return i if pieces[i] == piece else None

    roles = {"bos_token": first.bos_id(), "eos_token": first.eos_id(), "unk_token": first.unk_id(), "pad_token": first.pad_id()}
    return Vocabulary(
        size=size,
        # as in transformers: a text that starts with a space is not given another one
        ids=lambda text, opens: (first if squeezes or (opens and not text.startswith((" ", "\u2581"))) else rest).encode(text),
        text=text,
        id_of=id_of,
        added=[AddedToken(pieces[i], i, True) for i in control]
        + [AddedToken(pieces[i], i, not declared and len(pieces[i].strip()) > 2) for i in user_defined],
        names={name: pieces[i] for name, i in roles.items() if i >= 0},
        matches=frozenset(piece for i, piece in enumerate(pieces) if not first.is_control(i)),
        opening=None,
        prefix_everywhere=squeezes or config.get("legacy") is True,
    )


def _kinds(proto: bytes) -> list[int]:
    """The types of a sentencepiece model's pieces: message field 1 is a piece, its field 3 the type, 1 if absent."""
    pieces = (value for field, value in _fields(proto) if field == 1 and isinstance(value, bytes))
    kinds = ([value for field, value in _fields(piece) if field == 3 and isinstance(value, int)] for piece in pieces)
    return [kind[-1] if kind else 1 for kind in kinds]


def _squeezes(proto: bytes) -> bool:
    """Whether a sentencepiece model removes extra whitespace: field 4 of its normalizer (message field 3), true if absent."""
    specs = (value for field, value in _fields(proto) if field == 3 and isinstance(value, bytes))
    return [True, *(value != 0 for spec in specs for field, value in _fields(spec) if field == 4)][-1]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message that sentencepiece could read."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        else:
            size, at = _varint(message, at) if key & 7 == 2 else (4 if key & 7 == 5 else 8, at)
            yield key >> 3, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A protobuf integer, 7 bits a byte from the lowest, and where it ends."""
    value = shift = 0
    while message[at] >= 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1
