"""Text to token ids and back, from the tokenizer files of a Hugging Face folder.

A special token's string counts as one only where the caller says so: in what a chat template wrote, never in what a
user wrote. Sentencepiece models put a space in front of a text (the dummy prefix); here only a text that opens a
document gets it, so the pieces of a text that was cut decode to that text.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from minitune.types import InputError

TOKENIZER_FILES = (  # what a saved Hugging Face folder carries over byte for byte
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# Protobuf merges a message field that comes twice: these bytes after a sentencepiece model set, in normalizer_spec
# (field 3), add_dummy_prefix (field 3) and remove_extra_whitespaces (field 4) to false.
NO_DUMMY_PREFIX = b"\x1a\x04\x18\x00\x20\x00"
USER_DEFINED = 4  # the type of a piece in a sentencepiece model
NOTHING = re.compile(r"(?!)")


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
    that ids finds in a text by itself. prefix_everywhere: text after an added token gets the dummy prefix too.
    """

    size: int
    ids: Callable[[str, bool], list[int]]
    text: Callable[[list[int], Mapping[int, str]], str]
    id_of: Callable[[str], int | None]
    added: list[AddedToken]
    names: Mapping[str, str]
    matches: frozenset[str]
    prefix_everywhere: bool


class Tokenizer(NamedTuple):
    """A vocabulary with its special tokens: special maps their text to their id, special_names e.g. "eos_token" to a text."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    add_bos: bool
    special: Mapping[str, int]
    special_names: Mapping[str, str]
    fingerprint: str
    added: Mapping[str, int]
    find_added: re.Pattern[str]
    find_special: re.Pattern[str]
    find_lookalike: re.Pattern[str]
    find_ordinary: re.Pattern[str]
    find_leak: re.Pattern[str]
    vocabulary: Vocabulary

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a whole text, without bos or eos; parse_special: the strings of special tokens in it become their ids."""
        return self._encode(text, self.find_added if parse_special else self.find_ordinary, True, {})

    def encode_stretch(self, text: str, *, opens: bool, restore: Mapping[int, str]) -> list[int]:
        """Ids of a stretch of a rendered chat, special tokens parsed; opens: it is the first of its document.

        restore is a table for str.translate, applied after the special tokens were found: characters that stand in for
        others keep what a message says from being read as a special token.
        """
        return self._encode(text, self.find_added, opens, restore)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids, with or without its special tokens; ids beyond the vocabulary (padded embeddings) have none."""
        hidden = frozenset(self.special.values()) if skip_special else frozenset()
        kept = [i for i in ids if 0 <= i < self.vocab_size and i not in hidden]
        return self.vocabulary.text(kept, {i: text for text, i in self.added.items()})

    def _encode(self, text: str, find: re.Pattern[str], opens: bool, restore: Mapping[int, str]) -> list[int]:
        ids, start = [], 0
        for match in find.finditer(text):
            ids += self._plain(text[start : match.start()].translate(restore), opens)
            ids.append(self.added[match[match.lastindex or 0]])
            start, opens = match.end(), self.vocabulary.prefix_everywhere
        return ids + self._plain(text[start:].translate(restore), opens)

    def _plain(self, text: str, opens: bool) -> list[int]:
        # The vocabulary would find some special tokens by itself: cut after their first character, they are plain text.
        borders = [0, *(i + 1 for i in starts(self.find_leak, text)), len(text)]
        parts = [text[a:b] for a, b in pairwise(borders) if a < b]
        return [i for n, part in enumerate(parts) for i in self.vocabulary.ids(part, opens and n == 0)]


def open_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.model (sentencepiece), else tokenizer.json, and the special tokens; InputError says what is wrong."""
    config = json_object(folder / "tokenizer_config.json")
    settings = json_object(folder / "special_tokens_map.json") | config
    vocabulary = _open_vocabulary(folder, config)
    names = dict(vocabulary.names)
    for name in NAMED_TOKENS:
        if name in settings:
            names.pop(name, None)
            if text := _text(settings[name]):
                names[name] = text
    added = {token.text: token for token in vocabulary.added}
    for token in _declared(folder, config):
        if token.text in added or vocabulary.id_of(token.text) in (None, token.id):
            added[token.text] = token
    for text in [*names.values(), *_more_special(settings)]:
        token_id = added[text].id if text in added else vocabulary.id_of(text)
        if token_id is not None:
            added[text] = added.get(text, AddedToken(text, token_id, True))._replace(special=True)
    for name in ("bos_token", "eos_token"):
        if name in names and names[name] not in added:
            raise InputError(
                f"tokenizer: {folder} {name} {names[name]!r} is no token of the vocabulary, expected one of its tokens; "
                "correct tokenizer_config.json"
            )
    names = {name: text for name, text in names.items() if text in added}
    ids = {name: added[text].id for name, text in names.items()}
    special = {text: token.id for text, token in added.items() if token.special}
    return Tokenizer(
        vocab_size=max([vocabulary.size, *(token.id + 1 for token in added.values())]),
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        pad_id=ids.get("pad_token", ids.get("eos_token", 0)),
        add_bos=settings.get("add_bos_token") is True,
        special=special,
        special_names=names,
        fingerprint=_fingerprint(folder),
        added={text: token.id for text, token in added.items()},
        find_added=_pattern(added.values()),
        find_special=_pattern(token for token in added.values() if token.special),
        find_lookalike=_pattern((AddedToken(text, i, True) for text, i in special.items()), re.IGNORECASE),
        find_ordinary=_pattern(token for token in added.values() if not token.special),
        find_leak=_pattern(AddedToken(text, i, True) for text, i in special.items() if text in vocabulary.matches),
        vocabulary=vocabulary,
    )


def starts(find: re.Pattern[str], text: str) -> Iterator[int]:
    """Where find matches in a text, overlapping matches included."""
    match = find.search(text)
    while match:
        yield match.start(match.lastindex or 0)
        match = find.search(text, match.start(match.lastindex or 0) + 1)


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without the file; InputError for anything else."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer: {path} is not JSON ({error}), expected an object; fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"tokenizer: {path} holds a {type(value).__name__}, expected an object; fetch the file again")
    return value


def _open_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        try:
            return _open_sentencepiece(model, config)
        except (RuntimeError, ValueError, IndexError) as error:  # what sentencepiece raises for damaged bytes
            if not fast.is_file():
                raise InputError(
                    f"tokenizer: {model} can't be read by sentencepiece ({error}), expected a sentencepiece model; "
                    "put the model's tokenizer.json next to it or fetch the file again"
                ) from None
    if fast.is_file():
        return _open_tokenizers(fast)
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
        ids=lambda text, opens: (first if opens and not text.startswith((" ", "\u2581")) else rest).encode(text),
        text=text,
        id_of=id_of,
        added=[AddedToken(pieces[i], i, True) for i in control]
        + [AddedToken(pieces[i], i, not declared and len(pieces[i].strip()) > 2) for i in user_defined],
        names={name: pieces[i] for name, i in roles.items() if i >= 0},
        matches=frozenset(piece for i, piece in enumerate(pieces) if not first.is_control(i)),
        prefix_everywhere=config.get("legacy") is True,
    )


def _kinds(proto: bytes) -> list[int]:
    """The types of a sentencepiece model's pieces: message field 1 is a piece, its field 3 the type, 1 if absent."""
    pieces = (value for field, value in _fields(proto) if field == 1 and isinstance(value, bytes))
    kinds = ([value for field, value in _fields(piece) if field == 3 and isinstance(value, int)] for piece in pieces)
    return [kind[-1] if kind else 1 for kind in kinds]


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


def _open_tokenizers(path: Path) -> Vocabulary:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            f"tokenizer: {path} needs the package tokenizers, which is not installed; pip install 'minitune[hf]'"
        ) from None
    spec = json_object(path)

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
        prefix_everywhere='"type": "Prepend"' in json.dumps(spec) or '"prepend_scheme": "always"' in json.dumps(spec),
    )


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


def _pattern(tokens: Iterable[AddedToken], flags: int = 0) -> re.Pattern[str]:
    """Finds the longest token that starts first; the token's own text is the match's last group."""
    longest_first = sorted((token for token in tokens if token.text), key=lambda token: -len(token.text))
    parts = []
    for left, right in ((False, False), (False, True), (True, False), (True, True)):
        texts = [re.escape(token.text) for token in longest_first if (token.lstrip, token.rstrip) == (left, right)]
        if texts:
            parts.append(r"\s*" * left + f"({'|'.join(texts)})" + r"\s*" * right)
    return re.compile("|".join(parts), flags) if parts else NOTHING


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else token if isinstance(token, str) else ""


def _more_special(settings: Mapping[str, Any]) -> list[str]:
    """The special tokens without a name: additional_special_tokens, or extra_special_tokens in newer folders."""
    more = [settings.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    return [_text(token) for tokens in more for token in (tokens.values() if isinstance(tokens, dict) else tokens)]


def _declared(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens of added_tokens.json (old folders: all of them special) and of tokenizer_config.json."""
    path, table = folder / "tokenizer_config.json", config.get("added_tokens_decoder") or {}
    try:
        return [AddedToken(text, int(i), True) for text, i in json_object(folder / "added_tokens.json").items()] + [
            AddedToken(t["content"], int(i), bool(t.get("special")), bool(t.get("lstrip")), bool(t.get("rstrip")))
            for i, t in table.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"tokenizer: {path} added_tokens_decoder can't be read ({error!r}), "
            'expected {"id": {"content": text, "special": bool}}; fetch the file again'
        ) from None


def _fingerprint(folder: Path) -> str:
    present = [(name, (folder / name).read_bytes()) for name in TOKENIZER_FILES if (folder / name).is_file()]
    return hashlib.sha256(repr([(name, hashlib.sha256(data).hexdigest()) for name, data in present]).encode()).hexdigest()
