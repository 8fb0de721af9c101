"""Text to token ids and back, from the tokenizer files of a Hugging Face folder.

A special token's string counts as one only where the caller says so: in what a chat template wrote,
never in what a user wrote. Sentencepiece models put a space in front of a text (the dummy prefix);
here only the text that starts a document gets it, so that the pieces of a text that was cut decode
to that text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from minitune.errors import InputError, quoted
from minitune.io.json_file import read_json_object
from minitune.text.added_tokens import added_tokens, token_names
from minitune.text.folder_files import tokenizer_fingerprint
from minitune.text.open_vocabulary import open_vocabulary
from minitune.text.vocabulary import AddedToken, Vocabulary

MATCHES_NOTHING = re.compile(r"(?!)")


class Tokenizer(NamedTuple):
    """Vocabulary with its special tokens.

    special: id by text of the special tokens. special_names: text by role, such as "eos_token".
    added: id by text of all tokens that are searched for before the vocabulary runs, special or
    not. add_bos: plain text begins with bos, as tokenizer.json's post-processor says, else
    tokenizer_config.json; a chat has what its template writes.
    The patterns find, in this order: added tokens; special ones; special ones in any letter case;
    added tokens that are not special; special ones that the vocabulary would recognize in plain
    text.
    markup_beginnings: beginnings of the special tokens that begin with no letter and no digit.
    longest_special: characters of the longest special token.
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
    markup_beginnings: frozenset[str]
    longest_special: int
    vocabulary: Vocabulary
    n_rows: int | None = None  # of the embedding, where added tokens lie beyond it

    def with_rows(self, n_rows: int, where: str) -> "Tokenizer":
        """Tokenizer for a model of so many rows: a text that needs a token beyond them is refused.

        Published folders declare added tokens that their embedding has no row for, and use none of
        them. InputError if other tokens than these lie beyond the rows, or bos or eos does.
        """
        if self.vocab_size <= n_rows:
            return self
        beyond = {i: text for text, i in self.added.items() if i >= n_rows}
        has_no_row = any(i not in beyond for i in range(n_rows, self.vocabulary.size))
        if has_no_row or self.bos_id in beyond or self.eos_id in beyond:
            raise InputError(
                f"tokenizer: {where} has {self.vocab_size} tokens, more than the model's {n_rows}, "
                "expected more by added tokens at most; are they of two models?"
            )
        key = hashlib.sha256(f"{self.fingerprint} {n_rows}".encode()).hexdigest()
        return self._replace(n_rows=n_rows, fingerprint=key)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a whole text, without bos or eos; parse_special: the strings of special tokens
        become their ids.
        """
        find = self.find_added if parse_special else self.find_ordinary
        return self._encode(text, find, True, {})

    def encode_span(
        self, text: str, *, starts_document: bool, restore: Mapping[int, str]
    ) -> list[int]:
        """Ids of a span of a rendered chat, with its special tokens parsed.

        starts_document: the span is the first of its document. restore: a table for str.translate
        that is applied once the special tokens are found: the placeholders that
        `escape_special_tokens` wrote become characters again.
        """
        return self._encode(text, self.find_added, starts_document, restore)

    def opens_after(self, text: str, opened: bool) -> bool:
        """Return True if text after this one gets a dummy prefix; opened: after an empty text."""
        if not text:
            return opened
        if not self.vocabulary.prefix_everywhere:
            return False
        ends = [match.end() for match in self.find_added.finditer(text)]
        return bool(ends) and ends[-1] == len(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids, with or without its special tokens.

        Ids beyond the vocabulary, as embeddings with padding have them, have no text.
        """
        hidden = frozenset(self.special.values()) if skip_special else frozenset()
        kept = [i for i in ids if 0 <= i < self.vocab_size and i not in hidden]
        return self.vocabulary.text(kept, {i: text for text, i in self.added.items()})

    def _encode(
        self, text: str, find: re.Pattern[str], starts_document: bool, restore: Mapping[int, str]
    ) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in find.finditer(text):
            ids += self._encode_plain(
                text[start : match.start()].translate(restore), starts_document
            )
            ids.append(self.added[match[match.lastindex or 0]])
            start = match.end()
            starts_document = self.vocabulary.prefix_everywhere
        ids += self._encode_plain(text[start:].translate(restore), starts_document)
        if self.n_rows is not None:
            self._check_rows(ids, self.n_rows)
        return ids

    def _check_rows(self, ids: Sequence[int], n_rows: int) -> None:
        odd = next((i for i in ids if i >= n_rows), None)
        if odd is not None:
            raise InputError(
                f"tokenizer: {quoted(self.decode([odd], skip_special=False))} is token {odd}, but "
                f"the model's embedding has {n_rows} rows, expected a text without it; remove it"
            )

    def _encode_plain(self, text: str, starts_document: bool) -> list[int]:
        # The vocabulary would recognize some special tokens by itself: cut after their first
        # character, they are plain text.
        cuts = [i + 1 for i in match_starts(self.special_known_to_vocab, text)]
        ids: list[int] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            if start < end:
                ids += self.vocabulary.ids(text[start:end], starts_document and start == 0)
        return ids


def open_tokenizer(folder: Path) -> Tokenizer:
    """Read the vocabulary and the special tokens of a folder.

    InputError for a file that is missing or damaged, and for a bos or eos that is no token.
    """
    config = read_json_object(folder / "tokenizer_config.json", "tokenizer", optional=True)
    settings = (
        read_json_object(folder / "special_tokens_map.json", "tokenizer", optional=True) | config
    )
    vocabulary = open_vocabulary(folder, config)
    names = token_names(vocabulary, settings)
    added = added_tokens(folder, vocabulary, names, config, settings)
    for name in ("bos_token", "eos_token"):
        if name in names and names[name] not in added:
            raise InputError(
                f"tokenizer: {folder} {name} {names[name]!r} is no token of the vocabulary, "
                "expected one of its tokens; correct tokenizer_config.json"
            )
    names = {name: text for name, text in names.items() if text in added}
    return _tokenizer(vocabulary, names, added, config, tokenizer_fingerprint(folder))


def match_starts(find: re.Pattern[str], text: str) -> Iterator[int]:
    """Places at which find matches in a text, overlapping matches included."""
    match = find.search(text)
    while match:
        start = match.start(match.lastindex or 0)
        yield start
        match = find.search(text, start + 1)


def _tokenizer(
    vocabulary: Vocabulary,
    names: Mapping[str, str],
    added: Mapping[str, AddedToken],
    config: Mapping[str, Any],
    fingerprint: str,
) -> Tokenizer:
    ids = {name: added[text].id for name, text in names.items()}
    special = [token for token in added.values() if token.special]
    # Without the whitespace that they swallow: for these two patterns, only where a token stands
    # matters.
    exact = [AddedToken(token.text, token.id, True) for token in special]
    if vocabulary.bos_text is None:
        add_bos = config.get("add_bos_token") is True
    else:
        add_bos = vocabulary.bos_text == names.get("bos_token")
    return Tokenizer(
        vocab_size=max([vocabulary.size, *(token.id + 1 for token in added.values())]),
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        pad_id=ids.get("pad_token", ids.get("eos_token", 0)),
        add_bos=add_bos,
        special={token.text: token.id for token in special},
        special_names=names,
        fingerprint=fingerprint,
        added={text: token.id for text, token in added.items()},
        find_added=_pattern(added.values()),
        find_special=_pattern(special),
        special_case_insensitive=_pattern(exact, re.IGNORECASE),
        find_ordinary=_pattern(token for token in added.values() if not token.special),
        special_known_to_vocab=_pattern(
            token for token in exact if token.text in vocabulary.recognized
        ),
        markup_beginnings=frozenset(_beginnings(token.text for token in special)),
        longest_special=max((len(token.text) for token in special), default=0),
        vocabulary=vocabulary,
    )


def _beginnings(texts: Iterable[str]) -> Iterator[str]:
    """Yield all beginnings of texts that begin with neither a letter nor a digit."""
    for text in texts:
        if text and not text[0].isalnum():
            for end in range(1, len(text) + 1):
                yield text[:end]


def _pattern(tokens: Iterable[AddedToken], flags: int = 0) -> re.Pattern[str]:
    """Pattern that finds the longest token that starts first; the token's own text is the match's
    last group.
    """
    longest_first = sorted(
        (token for token in tokens if token.text), key=lambda token: -len(token.text)
    )
    parts = []
    # Tokens that swallow the same whitespace share one group.
    for lstrip, rstrip in ((False, False), (False, True), (True, False), (True, True)):
        texts = [
            re.escape(token.text)
            for token in longest_first
            if (token.lstrip, token.rstrip) == (lstrip, rstrip)
        ]
        if texts:
            before = r"\s*" if lstrip else ""
            after = r"\s*" if rstrip else ""
            parts.append(f"{before}({'|'.join(texts)}){after}")
    return re.compile("|".join(parts), flags) if parts else MATCHES_NOTHING
