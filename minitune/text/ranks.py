"""Vocabulary of a file of ranks: a line for each token, as base64 and rank, the format of tiktoken
and of Llama 3.

Llama 3's own file lists only its ordinary tokens. How text is cut before merging, and which special
tokens follow, stands in Meta's code and here.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from minitune.errors import InputError

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
N_RANKS = 128_000
N_SPECIAL = 256
# The regular expression that cuts a text into words, inside which tokens are merged.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Place after the ordinary tokens -> text; the others are <|reserved_special_token_0|> and so on.
SPECIAL = {
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


def holds_ranks(path: Path) -> bool:
    """True if the first line of a file is a token and its rank."""
    with path.open("rb") as file:
        return RANK_LINE.fullmatch(file.readline(1000)) is not None


def ranks_to_spec(path: Path) -> dict[str, Any]:
    """Write Meta's list of ranks as the content of a tokenizer.json.

    InputError for a line that can't be read and for ranks that are not Llama 3's.
    """
    ranks = _read_ranks(path)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    return {
        "added_tokens": _special_tokens(len(ranks)),
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": WORD_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is that token, however it may be merged
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": _merges(ranks, spelled),
        },
    }


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are the numbers from 0 on."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"tokenizer: {path}:{number} can't be read ({error}), expected a base64 token and "
                "its rank; fetch the file again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > N_RANKS:
        raise InputError(
            f"tokenizer: {path} holds {len(ranks)} ranks up to {max(ranks.values())}, expected "
            f"Llama 3's {N_RANKS}, each once; put the model's tokenizer.json next to it"
        )
    return ranks


def _merges(ranks: dict[bytes, int], spelled: dict[bytes, str]) -> list[list[str]]:
    """Pairs of tokens that join to a token, in the order in which they are merged.

    tiktoken merges the pair whose union has the lowest rank. So every cut of a token in two tokens
    is a merge, sorted by the rank of the token, then by the ranks of its parts.
    """
    merges: list[tuple[int, int, int, list[str]]] = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left = token[:i]
            right = token[i:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], [spelled[left], spelled[right]]))
    return [pair for *_, pair in sorted(merges)]


def _special_tokens(first_id: int) -> list[dict[str, Any]]:
    """Llama 3's special tokens, numbered from first_id, as added tokens of a tokenizer.json."""
    flags = {
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
    }
    tokens = []
    n_reserved = 0
    for i in range(N_SPECIAL):
        text = SPECIAL.get(i)
        if text is None:
            text = f"<|reserved_special_token_{n_reserved}|>"
            n_reserved += 1
        tokens.append({"id": first_id + i, "content": text, **flags})
    return tokens


def _byte_letters() -> list[str]:
    """Letter that a byte-level tokenizer.json writes for each byte: itself if it is printable, else
    one from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(0x100)]
