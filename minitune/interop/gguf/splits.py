"""Ways in which byte-level tokenizers cut a text before they merge, by llama.cpp's names."""

from collections.abc import Mapping
from typing import Any

DIGITS = "digits"  # each by itself
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%(suffix)s"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%(suffix)s|%(numbers)s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
)
# How tokenizer.json cuts -> {ignore_merges of the model: llama.cpp's name, which stands for both}
SPLITS = {
    (GPT2,): {False: "gpt-2"},
    (DIGITS, GPT2): {False: "smollm"},
    (WORDS % r"\p{N}{1,3}",): {True: "llama-bpe", False: "dbrx"},
    (WORDS % r"\p{N}",): {False: "qwen2"},
    (CASES % {"suffix": "", "numbers": r"\p{N}"},): {True: "tekken"},
    (CASES % {"suffix": f"{SUFFIXES}?", "numbers": r"\p{N}{1,3}"},): {False: "gpt-4o"},
}


def split_steps(step: Mapping[str, Any]) -> tuple[str, ...]:
    """Expressions that a pre-tokenizer cuts at, step by step; others are named by their type."""
    kind = str(step.get("type", "nothing"))
    if kind == "Sequence":
        return tuple(cut for inner in step["pretokenizers"] for cut in split_steps(inner))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return (GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits" and step.get("individual_digits"):
        return (DIGITS,)
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (str(step["pattern"].get("Regex")),)
    return (kind,)
