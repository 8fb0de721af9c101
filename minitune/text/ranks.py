"""Vocabulary of a file of ranks, as Mistral's and tiktoken's."""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from minitune.errors import InputError

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


def holds_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return RANKS.fullmatch(file.readline(1000)) is not None


def spec_of_ranks(path: Path) -> dict[str, Any]:
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
