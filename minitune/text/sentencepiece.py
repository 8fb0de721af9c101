"""Vocabulary of a sentencepiece model.

The package reads a model and tokenizes, but tells neither the types of pieces nor the normalizer's
settings, so those are read from the model's protobuf message here.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from minitune.text.vocabulary import AddedToken, Vocabulary

# Protobuf merges a message field that comes twice: these bytes after a sentencepiece model set, in
# normalizer_spec (field 3), add_dummy_prefix (field 3) and remove_extra_whitespaces (field 4) to
# false.
NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"
# Numbers of fields in ModelProto and in the messages inside it, and the type of a piece that a user
# defined.
PIECES, NORMALIZER = 1, 3
PIECE_TYPE, REMOVE_EXTRA_WHITESPACES = 3, 4
USER_DEFINED = 4
TYPE_KEY = bytes([PIECE_TYPE << 3])  # what stands before a type, which is a varint
_Field = tuple[int, int | bytes]  # (number, value)
SPACES = (" ", "\u2581")  # U+2581 is how sentencepiece writes a space


def open_sentencepiece(
    path: Path,
    config: Mapping[str, Any],
    *,
    prefixes_spaces: bool = False,
) -> Vocabulary:
    """Read a sentencepiece model; config: tokenizer_config.json.

    prefixes_spaces: the dummy prefix also stands before a text that begins with a space.
    RuntimeError, ValueError or IndexError for damaged bytes.
    """
    proto = path.read_bytes()
    if not proto:  # sentencepiece takes an empty file for an empty model
        raise RuntimeError("an empty file")
    inside = SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
    at_start = SentencePieceProcessor(model_proto=proto)
    if config.get("add_prefix_space") is False:
        at_start = inside
    pieces = [at_start.id_to_piece(i) for i in range(at_start.vocab_size())]
    fields = [*_fields(proto)]
    squeezes = _removes_extra_whitespace(fields)
    model = _Model(at_start, inside, pieces, squeezes, prefixes_spaces)
    roles = {
        "bos_token": at_start.bos_id(),
        "eos_token": at_start.eos_id(),
        "unk_token": at_start.unk_id(),
        "pad_token": at_start.pad_id(),
    }
    return Vocabulary(
        size=len(pieces),
        ids=model.ids,
        text=model.text,
        id_of=model.id_of,
        added=_added_tokens(at_start, pieces, _piece_types(fields), config),
        names={name: pieces[i] for name, i in roles.items() if i >= 0},
        recognized=frozenset(piece for i, piece in enumerate(pieces) if not at_start.is_control(i)),
        bos_text=None,
        prefix_everywhere=squeezes or config.get("legacy") is True,
    )


class _Model(NamedTuple):
    """Sentencepiece model, once with the dummy prefix and once without it.

    squeezes: it squeezes runs of spaces to one, and takes away those at the ends of a text as well:
    then every text needs the dummy prefix, not only the one that starts a document.
    """

    at_start: SentencePieceProcessor
    inside: SentencePieceProcessor
    pieces: list[str]
    squeezes: bool
    prefixes_spaces: bool

    def ids(self, text: str, starts_document: bool) -> list[int]:
        """Ids of a text."""
        # As in transformers: a text that starts with a space is not given another one by Llama's
        # tokenizer, and is by what the other families have.
        begins = self.prefixes_spaces or not text.startswith(SPACES)
        prefixed = self.squeezes or (starts_document and begins)
        return (self.at_start if prefixed else self.inside).encode(text)

    def text(self, ids: list[int], added: Mapping[int, str]) -> str:
        """Text of ids, of which the added ones have a text of their own."""
        parts: list[str] = []
        for is_added, run in groupby(ids, lambda i: i in added):
            if is_added:
                parts += [added[i] for i in run]
            else:
                processor = self.inside if parts else self.at_start
                parts.append(processor.decode([i for i in run if i < len(self.pieces)]))
        return "".join(parts)

    def id_of(self, piece: str) -> int | None:
        """Id of a piece; None if there is none."""
        i = self.at_start.piece_to_id(piece)
        return i if self.pieces[i] == piece else None


def _added_tokens(
    processor: SentencePieceProcessor,
    pieces: list[str],
    types: list[int],
    config: Mapping[str, Any],
) -> list[AddedToken]:
    """Control pieces, all of them special, and the pieces that a user defined.

    added_tokens_decoder says which of the latter are special. Without it, those are that are long
    enough for markup: a single character, such as a digit or a line break, is text.
    """
    declared = "added_tokens_decoder" in config
    control = [
        AddedToken(pieces[i], i, True) for i in range(len(pieces)) if processor.is_control(i)
    ]
    user_defined = [
        AddedToken(pieces[i], i, not declared and len(pieces[i].strip()) > 2)
        for i, kind in enumerate(types)
        if kind == USER_DEFINED
    ]
    return control + user_defined


def _piece_types(fields: Sequence[_Field]) -> list[int]:
    """Types of a sentencepiece model's pieces, in their order; 1 (normal) where the message leaves
    it out.
    """
    types = []
    for field, piece in fields:
        if field == PIECES and isinstance(piece, bytes):
            # most pieces leave it out, and a vocabulary has up to 256,000
            inner = _fields(piece) if TYPE_KEY in piece else ()
            values = [
                value for field, value in inner if field == PIECE_TYPE and isinstance(value, int)
            ]
            types.append(values[-1] if values else 1)
    return types


def _removes_extra_whitespace(fields: Sequence[_Field]) -> bool:
    """True if the model's normalizer removes extra whitespace, which is the default where the
    message leaves it out.
    """
    removes = True
    for field, normalizer in fields:
        if field == NORMALIZER and isinstance(normalizer, bytes):
            for inner, value in _fields(normalizer):
                if inner == REMOVE_EXTRA_WHITESPACES:
                    removes = value != 0
    return removes


def _fields(message: bytes) -> Iterator[_Field]:
    """(field number, value) of a protobuf message that sentencepiece could read.

    A key holds the field's number and, in its lowest three bits, the wire type: 0 a varint, 2 bytes
    after their length, 5 four bytes, 1 eight bytes.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number = key >> 3
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        else:
            size = 4 if wire_type == 5 else 8
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Protobuf integer that starts at `at`, 7 bits a byte from the lowest, and where it ends."""
    value = 0
    shift = 0
    while message[at] >= 0x80:
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1
