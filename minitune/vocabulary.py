"""What turns text into token ids between special tokens: sentencepiece, tokenizer.json, or Meta's list of ranks."""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from minitune.types import InputError

# Protobuf merges a message field that comes twice: these bytes after a sentencepiece model set, in normalizer_spec
# (field 3), add_dummy_prefix (field 3) and remove_extra_whitespaces (field 4) to false.
NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"
USER_DEFINED = 4  # the type of a piece in a sentencepiece model

# Llama 3's own file lists only its ordinary tokens, as base64 and rank: how text is cut and what comes after is in Meta's code.
RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
N_RANKS = 128_000
N_SPECIAL = 256
CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = {  # place after the ordinary tokens -> text; the others are <|reserved_special_token_0|> and so on
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
ROLES = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[4]}


class AddedToken(NamedTuple):
    """A token that is looked for in a text before the vocabulary is; lstrip, rstrip: it swallows the whitespace there."""

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class Vocabulary(NamedTuple):
    """What tokenizes text between added tokens, and what its file declares.

    ids(text, opens): opens = the text opens a document. text(ids, added): added = text by id. matches: the added tokens
    that ids finds in a text by itself. opening: the token that tokenizer.json puts in front of a text, "" for none, None where
    that file was not asked. prefix_everywhere: text after an added token gets the dummy prefix too.
    """

    size: int
    ids: Callable[[str, bool], list[int]]
    text: Callable[[list[int], Mapping[int, str]], str]
    id_of: Callable[[str], int | None]
    added: list[AddedToken]
    names: Mapping[str, str]
    matches: frozenset[str]
    opening: str | None
    prefix_everywhere: bool


def open_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read tokenizer.model (sentencepiece, or Meta's ranks where no tokenizer.json says more), else tokenizer.json.

    config: tokenizer_config.json. InputError names the file that is missing or damaged.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file() and not (fast.is_file() and _holds_ranks(model)):
        if _holds_ranks(model):
            return _of_spec(model, _spec_of_ranks(model))._replace(names=ROLES, opening=ROLES["bos_token"])
        try:
            vocabulary = _open_sentencepiece(model, config)
            asked = fast.is_file() and "add_bos_token" not in config
            return vocabulary._replace(opening=_opening(json_object(fast))) if asked else vocabulary
        except (RuntimeError, ValueError, IndexError) as error:  # what sentencepiece raises for damaged bytes
            if not fast.is_file():
                raise InputError(
                    f"tokenizer: {model} can't be read by sentencepiece ({error}), expected a sentencepiece model; "
                    "put the model's tokenizer.json next to it or fetch the file again"
                ) from None
    if fast.is_file():
        return _of_spec(fast, json_object(fast))
    raise InputError(
        f"tokenizer: {folder} holds neither file, expected tokenizer.model or tokenizer.json; copy one from the model"
    )


def _open_sentencepiece(path: Path, config: Mapping[str, Any]) -> Vocabulary:
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


def _of_spec(path: Path, spec: Mapping[str, Any]) -> Vocabulary:
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
        opening=_opening(spec),
        prefix_everywhere='"type": "Prepend"' in json.dumps(spec) or '"prepend_scheme": "always"' in json.dumps(spec),
    )


def _opening(spec: Mapping[str, Any]) -> str:
    """The special token that the post-processor of a tokenizer.json puts in front of a text, "" for none."""
    processor = spec.get("post_processor") or {}
    for one in processor.get("processors") or [processor]:
        first = (one.get("single") or [{}])[0] if one.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return ""


def _holds_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return RANKS.fullmatch(file.readline(1000)) is not None


def _spec_of_ranks(path: Path) -> dict[str, Any]:
    """Meta's list as a tokenizer.json: a token's merges are its cuts in two tokens, and the lower rank is merged first."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"tokenizer: {path}:{number} can't be read ({error}), expected a base64 token and its rank; fetch the file again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > N_RANKS:
        raise InputError(
            f"tokenizer: {path} holds {len(ranks)} ranks up to {max(ranks.values())}, expected Llama 3's {N_RANKS}, each once; "
            "put the model's tokenizer.json next to it"
        )
    letters = _letters()
    shown = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (rank, ranks[token[:i]], ranks[token[i:]], (shown[token[:i]], shown[token[i:]]))
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    names = dict(SPECIAL)
    spare = iter(range(N_SPECIAL))
    texts = [names.get(i) or f"<|reserved_special_token_{next(spare)}|>" for i in range(N_SPECIAL)]
    flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {
        "added_tokens": [{"id": len(ranks) + i, "content": text, **flags} for i, text in enumerate(texts)],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": CUTS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is that token, however it may be merged
            "vocab": {shown[token]: rank for token, rank in ranks.items()},
            "merges": [list(pair) for *_, pair in sorted(merges)],
        },
    }


def _letters() -> list[str]:
    """The letter that a byte-level tokenizer.json writes for each byte: itself where it can be seen, else one from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(spare)) for byte in range(0x100)]


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


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without the file; InputError for anything else."""
    try:
        data = path.read_bytes() if path.is_file() else b"{}"
        value = json.loads(data)
        if b"\\ud" in data.lower():  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer: {path} is not JSON ({error}), expected an object; fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"tokenizer: {path} holds a {type(value).__name__}, expected an object; fetch the file again")
    return value
