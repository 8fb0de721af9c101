"""Tokenizer of a Hugging Face folder as GGUF metadata, for the kinds of tokenizer that llama.cpp implements itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.text.tokenizer import Tokenizer, open_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how tokenizer.json cuts a text before its merges -> llama.cpp's name for it
    (GPT2,): "gpt-2",
    ("digits", GPT2): "smollm",
    (WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (WORDS % r"\p{N}",): "qwen2",
}


def metadata(folder: Path, n_rows: int, stop_ids: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """(keys, notes) of the tokenizer in a folder, for an embedding of n_rows.

    Sentencepiece BPE becomes "llama", byte-level BPE with a known way to cut texts "gpt2"; anything else "none", with a note:
    such a file runs on token ids only. The first of stop_ids that is not eos is the end of a turn. InputError if the
    vocabulary has more tokens than the embedding has rows.
    """
    tokenizer = open_tokenizer(folder)
    if tokenizer.vocab_size > n_rows:
        raise InputError(
            f"gguf: {folder} has {tokenizer.vocab_size} tokens, expected at most {n_rows}, the rows of the embedding; "
            "it is the tokenizer of another model"
        )
    found = _sentencepiece(folder / "tokenizer.model", tokenizer)
    if found is None:
        found = _byte_level(read_json_object(folder / "tokenizer.json", "gguf"))
    if isinstance(found, str):
        return {"tokenizer.ggml.model": "none"}, [f"no tokenizer written, so llama.cpp takes token ids only: {found}"]
    model, pieces, more = found
    added, special = {i: text for text, i in tokenizer.added.items()}, frozenset(tokenizer.special.values())
    tokens = [_token(i, pieces, added, special) for i in range(n_rows)]
    texts, kinds, scores = ([*column] for column in zip(*tokens, strict=True))
    ids = {key: tokenizer.added[tokenizer.special_names[role]] for role, key in ROLES.items() if role in tokenizer.special_names}
    turn = [i for i in stop_ids if i != tokenizer.eos_id]
    keys = {
        "model": model,
        "tokens": texts,
        **({"scores": scores} if model == "llama" else {}),
        "token_type": kinds,
        **{f"{name}_token_id": i for name, i in ids.items()},
        **({"eot_token_id": turn[0]} if turn else {}),
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}, []


Pieces = Mapping[int, tuple[str, int, float]]  # id -> text, kind, score


def _token(i: int, pieces: Pieces, added: Mapping[int, str], special: frozenset[int]) -> tuple[str, int, float]:
    """(text, kind, score) of a row of the embedding; added tokens stand before the vocabulary's own."""
    text, kind, score = pieces.get(i, (f"[PAD{i}]", UNUSED, -1000.0))
    if i not in added or kind == UNKNOWN:
        return text, kind, score
    if i in special:
        return added[i], CONTROL, score
    return added[i].replace("\u2581", " "), USER_DEFINED, score  # looked for in the text itself, where spaces are spaces


def _sentencepiece(path: Path, tokenizer: Tokenizer) -> tuple[str, Pieces, dict[str, Any]] | str | None:
    """(model, pieces, more keys), None if there is no such model, or why it can't be written."""
    try:
        sp = SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError):
        return None

    def kind(i: int) -> int:
        kinds = {UNKNOWN: sp.is_unknown, CONTROL: sp.is_control, BYTE: sp.is_byte, UNUSED: sp.is_unused}
        return next((kind for kind, is_one in kinds.items() if is_one(i)), NORMAL)

    pieces = {i: (sp.id_to_piece(i), kind(i), sp.get_score(i)) for i in range(sp.vocab_size())}
    if any(score != round(score) for _, kind, score in pieces.values() if kind == NORMAL):
        return f"{path} is a unigram model, expected BPE (whose scores are ranks)"
    has_dummy_prefix = tokenizer.vocabulary.ids("a", True) != tokenizer.vocabulary.ids("a", False)
    return "llama", pieces, {"add_space_prefix": has_dummy_prefix}


def _byte_level(spec: Mapping[str, Any]) -> tuple[str, Pieces, dict[str, Any]] | str:
    """(model, pieces, more keys) of a tokenizer.json, or why it can't be written."""
    model, cuts = spec["model"], _cuts(spec.get("pre_tokenizer") or {})
    if model["type"] != "BPE" or cuts not in SPLITS:
        return f"tokenizer.json is {model['type']} cut by {cuts}, expected byte-level BPE as in Llama 3, Qwen 2, SmolLM or GPT-2"
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes a text as it comes, and nearly every text comes in NFC
        return f"tokenizer.json is normalized by {normalizer}, expected none"
    tokens = {**{t["content"]: t["id"] for t in spec.get("added_tokens") or []}, **model["vocab"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return "gpt2", {i: (text, NORMAL, 0.0) for text, i in tokens.items()}, {"pre": SPLITS[cuts], "merges": merges}


def _cuts(step: Mapping[str, Any]) -> tuple[str, ...]:
    """Expressions that a pre-tokenizer cuts at, step by step; what has no counterpart in llama.cpp is named by its type."""
    kind = str(step.get("type", "nothing"))
    if kind == "Sequence":
        return tuple(cut for inner in step["pretokenizers"] for cut in _cuts(inner))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return (GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits" and step.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (str(step["pattern"].get("Regex")),)
    return (kind,)
