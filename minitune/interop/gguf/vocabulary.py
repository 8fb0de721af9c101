"""Tokenizer of a Hugging Face folder as GGUF metadata, for the kinds that llama.cpp implements."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from minitune.errors import InputError
from minitune.interop.gguf.splits import SPLITS, split_steps
from minitune.io.json_file import read_json_object
from minitune.text.tokenizer import Tokenizer, open_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPACE = "\u2581"  # how sentencepiece writes a space
BYTES = frozenset(f"<0x{i:02X}>" for i in range(256))
PHI3_KEEP_SPACES = (
    "<unk>",
    "<s>",
    "<|endoftext|>",
)  # Phi-3's special tokens that swallow no whitespace behind them

Piece = tuple[str, int, float]  # text, kind, score


class _Model(NamedTuple):
    """Tokenizer model of llama.cpp: its name, pieces by id, further keys, and notes."""

    name: str
    pieces: Mapping[int, Piece]
    keys: Mapping[str, Any]
    notes: Sequence[str] = ()


def metadata(
    folder: Path,
    n_rows: int,
    stop_ids: Sequence[int],
) -> tuple[dict[str, Any], list[str]]:
    """(keys, notes) of the tokenizer in a folder, for an embedding of n_rows.

    Sentencepiece BPE becomes "llama", byte-level BPE with a known way to cut texts "gpt2"; anything
    else "none", with a note: such a file runs on token ids only. The first of stop_ids that is not
    eos is the end of a turn. Added tokens beyond the rows are left out, with a note. InputError if
    other tokens are beyond them.
    """
    tokenizer = open_tokenizer(folder)
    beyond = tokens_beyond(tokenizer, n_rows)
    found = _sentencepiece(folder / "tokenizer.model")
    if found is None:
        found = _from_json(read_json_object(folder / "tokenizer.json", "gguf"))
    if isinstance(found, str):
        why = f"no tokenizer written, so llama.cpp takes token ids only: {found}"
        return {"tokenizer.ggml.model": "none"}, [why]
    rows = f"the embedding has {n_rows} rows"
    left_out = [f"token {i} {text!r} left out: {rows}" for i, text in sorted(beyond.items())]
    notes = [*found.notes, *left_out]
    prefix, prefix_notes = _prefix_keys(tokenizer) if found.name == "llama" else ({}, [])
    name, space_notes = _swallowed_space(tokenizer)
    keys = {**_keys(found, tokenizer, n_rows, stop_ids), **prefix}
    return {**name, **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}, [
        *notes,
        *prefix_notes,
        *space_notes,
    ]


def tokens_beyond(tokenizer: Tokenizer, n_rows: int) -> dict[int, str]:
    """Added tokens that the embedding has no row for; InputError if others have none."""
    beyond = {i: text for text, i in tokenizer.added.items() if i >= n_rows}
    others = (i for i in reversed(range(tokenizer.vocab_size)) if i not in beyond)
    n_needed = next(others, -1) + 1
    if n_needed > n_rows:
        raise InputError(
            f"gguf: the tokenizer has {n_needed} tokens, expected at most {n_rows}, the rows of "
            "the embedding; it is that of another model"
        )
    return beyond


def _keys(
    model: _Model,
    tokenizer: Tokenizer,
    n_rows: int,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    added, special = (
        {i: text for text, i in tokenizer.added.items()},
        frozenset(tokenizer.special.values()),
    )
    tokens = _tokens(n_rows, model.pieces, added, special)
    texts, kinds, scores = ([*column] for column in zip(*tokens, strict=True))
    names = tokenizer.special_names
    ids = {key: tokenizer.added[names[role]] for role, key in ROLES.items() if role in names}
    turn = [i for i in stop_ids if i != tokenizer.eos_id]
    ids |= {"eot": turn[0]} if turn else {}
    return {
        "model": model.name,
        "tokens": texts,
        **({"scores": scores} if model.name == "llama" else {}),
        "token_type": kinds,
        **{f"{name}_token_id": i for name, i in ids.items() if i < n_rows},
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        **model.keys,
    }


def _tokens(
    n_rows: int,
    pieces: Mapping[int, Piece],
    added: Mapping[int, str],
    special: frozenset[int],
) -> list[Piece]:
    """Token of every row of the embedding; added tokens stand before the vocabulary's own."""
    tokens = []
    for i in range(n_rows):
        text, kind, score = pieces.get(i, (f"[PAD{i}]", UNUSED, -1000.0))
        if i in added and kind != UNKNOWN:
            # an added token is looked for in the text itself, where spaces are spaces
            text = added[i] if i in special else added[i].replace(SPACE, " ")
            kind = CONTROL if i in special else USER_DEFINED
        tokens.append((text, kind, score))
    return tokens


def _sentencepiece(path: Path) -> _Model | str | None:
    """Model of a sentencepiece file, None if there is no such file, or why it can't be written."""
    try:
        sp = SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError):
        return None

    def kind(i: int) -> int:
        kinds = {
            UNKNOWN: sp.is_unknown,
            CONTROL: sp.is_control,
            BYTE: sp.is_byte,
            UNUSED: sp.is_unused,
        }
        return next((kind for kind, is_one in kinds.items() if is_one(i)), NORMAL)

    pieces = {i: (sp.id_to_piece(i), kind(i), sp.get_score(i)) for i in range(sp.vocab_size())}
    if any(score != round(score) for _, kind, score in pieces.values() if kind == NORMAL):
        return f"{path} is a unigram model, expected BPE (whose scores are ranks)"
    return _spm(pieces)


def _from_json(spec: Mapping[str, Any]) -> _Model | str:
    """Model of a tokenizer.json, or why it can't be written."""
    model = spec["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return _byte_fallback(spec)
    return _byte_level(spec)


def _byte_level(spec: Mapping[str, Any]) -> _Model | str:
    """Byte-level BPE: Llama 3, Qwen, OLMo 2, SmolLM, Granite, Mistral's tekken and their kin."""
    model, steps = spec["model"], split_steps(spec.get("pre_tokenizer") or {})
    ignores = bool(model.get("ignore_merges"))
    names = SPLITS.get(steps, {})
    if model["type"] != "BPE" or not names:
        return (
            f"tokenizer.json is {model['type']} cut by {steps}, expected byte-level BPE as in "
            "Llama 3, Qwen 2, SmolLM, GPT-2, tekken or gpt-4o"
        )
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (
        None,
        "NFC",
    ):  # llama.cpp takes a text as it comes, and nearly every text comes in NFC
        return f"tokenizer.json is normalized by {normalizer}, expected none"
    notes = []
    if ignores not in names:
        merges, whole = "merges the bytes of every word", "takes a word that is a token whole"
        there, here = (merges, whole) if ignores else (whole, merges)
        notes.append(f"ignore_merges is {ignores}: llama.cpp {there}, this tokenizer {here}")
    tokens = {**{t["content"]: t["id"] for t in spec.get("added_tokens") or []}, **model["vocab"]}
    keys = {"pre": names.get(ignores, next(iter(names.values()))), "merges": _merges(model)}
    return _Model("gpt2", {i: (text, NORMAL, 0.0) for text, i in tokens.items()}, keys, notes)


def _byte_fallback(spec: Mapping[str, Any]) -> _Model | str:
    """Sentencepiece BPE in a tokenizer.json (Llama 2, Gemma): scores are ranks of merges."""
    model = spec["model"]
    ranks: dict[str, list[int]] = {}
    for rank, merge in enumerate(_merges(model)):
        left, right = merge.split(" ", 1)
        ranks.setdefault(left + right, []).append(rank)
    split = next((text for text, own in ranks.items() if own[-1] - own[0] != len(own) - 1), None)
    if split is not None:
        found = f"tokenizer.json has merges to {split!r} at ranks {ranks[split]}"
        return f"{found}, expected them together, as sentencepiece has"
    scores = {text: -float(own[0]) for text, own in ranks.items()}
    normal = {i: (text, NORMAL, scores.get(text, 0.0)) for text, i in model["vocab"].items()}
    roles = {i: (text, BYTE, 0.0) for text, i in model["vocab"].items() if text in BYTES}
    unknown = model["vocab"].get(model.get("unk_token"), model["vocab"].get("<unk>"))
    if unknown is not None:
        roles[unknown] = (normal[unknown][0], UNKNOWN, 0.0)
    return _spm({**normal, **roles})


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _spm(pieces: Mapping[int, Piece]) -> _Model:
    notes = []
    if sum(kind == BYTE for _, kind, _ in pieces.values()) < len(BYTES):
        lacks = "the tokenizer has no pieces for bytes"
        notes.append(f"{lacks}: llama.cpp aborts at a character that the vocabulary lacks")
    return _Model("llama", pieces, {}, notes)


def _prefix_keys(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Key for the space in front of a text, and a note where llama.cpp writes it in more places."""
    has_prefix = tokenizer.vocabulary.ids("a", True) != tokenizer.vocabulary.ids("a", False)
    notes = []
    if has_prefix and not tokenizer.vocabulary.prefix_everywhere:
        there = "llama.cpp puts a space in front of text behind a special token too"
        notes.append(f"{there}, this tokenizer at the start alone")
    return {"add_space_prefix": has_prefix}, notes


def _swallowed_space(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Key that tells llama.cpp of special tokens which swallow whitespace behind them, or a note.

    It knows of them by the name of the model: in a Phi-3 all do but for PHI3_KEEP_SPACES.
    """
    swallows = {text for text in tokenizer.special if _match_length(tokenizer, text) > len(text)}
    keeps = tokenizer.special.keys() - swallows
    if not swallows:
        return {}, []
    if keeps <= {*PHI3_KEEP_SPACES}:
        return {"general.name": "phi-3"}, []
    here = f"{min(swallows)!r} swallows the whitespace behind it in this tokenizer"
    return {}, [f"{here}, and does not in llama.cpp"]


def _match_length(tokenizer: Tokenizer, text: str) -> int:
    """Characters that a special token takes of itself with a space behind it."""
    match = tokenizer.find_added.match(f"{text} ")
    return 0 if match is None else match.end()
