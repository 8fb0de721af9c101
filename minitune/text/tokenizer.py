"""Text to token ids and back, from the tokenizer files of a Hugging Face folder.

A special token's string counts as one only where the caller says so: in what a chat template wrote, never in what a
user wrote. Sentencepiece models put a space in front of a text (the dummy prefix); here only a text that opens a
document gets it, so the pieces of a text that was cut decode to that text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.text.open_vocabulary import open_vocabulary
from minitune.text.vocabulary import AddedToken, Vocabulary, json_object

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
MAX_ID = 2**31  # token ids are int32 in files
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

NOTHING = re.compile(r"(?!)")


class Tokenizer(NamedTuple):
    """A vocabulary with its special tokens: special maps their text to their id, special_names e.g. "eos_token" to a text.

    add_bos: plain text opens with bos, as tokenizer.json's post-processor says (tokenizer_config.json where there is none);
    a chat has what its template writes.
    """

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
    special_case_insensitive: re.Pattern[str]
    find_ordinary: re.Pattern[str]
    special_known_to_vocab: re.Pattern[str]
    vocabulary: Vocabulary

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a whole text, without bos or eos; parse_special: the strings of special tokens in it become their ids."""
        return self._encode(text, self.find_added if parse_special else self.find_ordinary, True, {})

    def encode_span(self, text: str, *, opens: bool, restore: Mapping[int, str]) -> list[int]:
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
        borders = [0, *(i + 1 for i in starts(self.special_known_to_vocab, text)), len(text)]
        parts = [text[a:b] for a, b in pairwise(borders) if a < b]
        return [i for n, part in enumerate(parts) for i in self.vocabulary.ids(part, opens and n == 0)]


def open_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.model, else tokenizer.json, and the special tokens; InputError says what is wrong."""
    config = json_object(folder / "tokenizer_config.json")
    settings = json_object(folder / "special_tokens_map.json") | config
    vocabulary = open_vocabulary(folder, config)
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
    opening = vocabulary.opening
    special = {text: token.id for text, token in added.items() if token.special}
    return Tokenizer(
        vocab_size=max([vocabulary.size, *(token.id + 1 for token in added.values())]),
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        pad_id=ids.get("pad_token", ids.get("eos_token", 0)),
        add_bos=config.get("add_bos_token") is True if opening is None else opening == names.get("bos_token"),
        special=special,
        special_names=names,
        fingerprint=_fingerprint(folder),
        added={text: token.id for text, token in added.items()},
        find_added=_pattern(added.values()),
        find_special=_pattern(token for token in added.values() if token.special),
        special_case_insensitive=_pattern((AddedToken(text, i, True) for text, i in special.items()), re.IGNORECASE),
        find_ordinary=_pattern(token for token in added.values() if not token.special),
        special_known_to_vocab=_pattern(AddedToken(text, i, True) for text, i in special.items() if text in vocabulary.matches),
        vocabulary=vocabulary,
    )


def starts(find: re.Pattern[str], text: str) -> Iterator[int]:
    """Where find matches in a text, overlapping matches included."""
    match = find.search(text)
    while match:
        yield match.start(match.lastindex or 0)
        match = find.search(text, match.start(match.lastindex or 0) + 1)


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
        declared = [AddedToken(text, int(i), True) for text, i in json_object(folder / "added_tokens.json").items()] + [
            AddedToken(t["content"], int(i), bool(t.get("special")), bool(t.get("lstrip")), bool(t.get("rstrip")))
            for i, t in table.items()
        ]
        odd = next((token for token in declared if not 0 <= token.id < MAX_ID), None)
        if odd is not None:
            raise ValueError(f"{odd.text!r} has the id {odd.id}")
        return declared
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"tokenizer: {path} added_tokens_decoder can't be read ({error!r}), "
            'expected {"id": {"content": text, "special": bool}}; fetch the file again'
        ) from None


def _fingerprint(folder: Path) -> str:
    present = [(name, (folder / name).read_bytes()) for name in TOKENIZER_FILES if (folder / name).is_file()]
    return hashlib.sha256(repr([(name, hashlib.sha256(data).hexdigest()) for name, data in present]).encode()).hexdigest()
