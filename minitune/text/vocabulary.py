"""Vocabularies: how text between special tokens becomes token ids, from whatever file."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

# The roles that a tokenizer gives to tokens, as transformers spells them in its JSON files.
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


class AddedToken(NamedTuple):
    """Token that is searched for in a text before the vocabulary's own model runs.

    lstrip, rstrip: it swallows the whitespace on that side.
    """

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class Vocabulary(NamedTuple):
    """Functions that tokenize text between added tokens, and what the vocabulary's file declares.

    size: number of ids, one more than the largest.
    ids(text, starts_document): the token ids of a text; the text that starts a document may get a
    dummy prefix. text(ids, added): the text of token ids; added: texts of the added tokens by id.
    id_of(text): the id of the token with exactly this text, None if there is none.
    added: the added tokens that the file declares.
    names: tokens by role, such as "eos_token", that the file declares.
    recognized: texts of tokens that `ids` turns into that one token although they stand in plain
    text. bos_text: the token that tokenizer.json puts in front of a text, "" for none, None without
    that file's word. prefix_everywhere: text after an added token gets the dummy prefix too.
    """

    size: int
    ids: Callable[[str, bool], list[int]]
    text: Callable[[list[int], Mapping[int, str]], str]
    id_of: Callable[[str], int | None]
    added: list[AddedToken]
    names: Mapping[str, str]
    recognized: frozenset[str]
    bos_text: str | None
    prefix_everywhere: bool
