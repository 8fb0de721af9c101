"""Tokenizer folders of the kinds that llama.cpp implements."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from support.tokenizers import CHAT_TOKENS, corpus, llama_config, sentencepiece_model

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (  # as in the tokenizer.json of Mistral Nemo
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (  # as in that of gpt-oss
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "send two pears to Berlin",
    " a  b\n\nc",
    "12 boxes, please! It's é 日本 🙂",
    "<|im_start|>user\nAnna<|im_end|>\n",
    "x1234y",
]


def sentencepiece_folder(folder: Path, user_defined: tuple[str, ...] = (), **changes: Any) -> Path:
    """A folder with a sentencepiece BPE model that has pieces for bytes, and chat tokens."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(True, user_defined))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(llama_config(**{"add_bos_token": True, "legacy": True, **changes})), encoding="utf-8"
    )
    return folder


def sentencepiece_json_folder(folder: Path) -> Path:
    """The same tokenizer as transformers writes it to tokenizer.json, without the sentencepiece file."""
    sentencepiece_folder(folder)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return folder


def split(pattern: str) -> Any:
    """A pre-tokenizer that cuts by an expression, then maps bytes to characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


CUTS = {  # llama.cpp's name -> (pre-tokenizer, ignore_merges)
    "llama-bpe": (split(LLAMA3), True),
    "dbrx": (split(LLAMA3), False),
    "qwen2": (split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), False),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
    ),
    "tekken": (split(TEKKEN), True),
    "gpt-4o": (split(GPT4O), False),
}


def byte_level_folder(folder: Path, cut: Any, ignore_merges: bool = False, normalizer: Any = None) -> Path:
    """A folder with a byte-level tokenizer.json, chat tokens and an added token that is not special."""
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    fast.pre_tokenizer, fast.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        fast.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))
    fast.add_special_tokens(CHAT_TOKENS)
    fast.add_tokens([AddedToken("two apples", normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}), encoding="utf-8"
    )
    return folder
