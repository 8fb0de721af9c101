"""Small tokenizers, trained from a seed, as minitune and as transformers or tokenizers open them."""

import io
import json
import random
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from minitune.text.tokenizer import Tokenizer, open_tokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
WORDS = ["the", "a", "order", "of", "two", "three", "apples", "pears", "Berlin", "please", "send", "12", "7", "boxes", "from"]
WORDS += ["Anna", "Bob", "user", "assistant", "system", "on", "Monday", "for", "to", "Paris", "in", "and", "with"]
PIECES = [
    *WORDS,
    " ",
    "  ",
    "\n",
    "é",
    "日本",
    "🙂",
    "{",
    '"',
    "<",
    "<|",
    "<|im_",
    "im_end|>",
    "[INST]",
    "<|IM_END|>",
    "<s>",
    *CHAT_TOKENS,
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
wild = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\u2581"), max_size=20)


def corpus() -> list[str]:
    """Sentences of a few words, drawn with a seed."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]


@cache
def sentencepiece_model(dummy_prefix: bool, user_defined: tuple[str, ...] = ()) -> bytes:
    """A small sentencepiece BPE model with the settings of Llama 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=list(user_defined),
        minloglevel=2,
    )
    return model.getvalue()


def llama_config(**changes: Any) -> dict[str, Any]:
    """A tokenizer_config.json as transformers writes it, the chat tokens behind the model's 380 pieces."""
    table = {"0": "<unk>", "1": "<s>", "2": "</s>", **{str(380 + i): text for i, text in enumerate(CHAT_TOKENS)}}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": False,
        "added_tokens_decoder": {i: {"content": text, **flags} for i, text in table.items()},
        **changes,
    }


def write_folder(model: bytes | None, config: dict[str, Any] | None) -> Path:
    """A fresh folder with tokenizer.model and tokenizer_config.json."""
    folder = Path(tempfile.mkdtemp())
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@cache
def llama(dummy_prefix: bool = True, legacy: bool = False) -> tuple[Tokenizer, LlamaTokenizer]:
    """minitune's and transformers' tokenizers of one Llama-2-like folder."""
    changes = {} if dummy_prefix else {"add_prefix_space": False}
    folder = write_folder(sentencepiece_model(dummy_prefix), llama_config(legacy=legacy, **changes))
    return open_tokenizer(folder), LlamaTokenizer.from_pretrained(folder)


@cache
def byte_level() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """minitune's and the package's tokenizers of one Llama-3-like tokenizer.json, with a token that swallows whitespace."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(corpus(), trainer)
    fast.add_special_tokens([*CHAT_TOKENS, "<s>"])
    fast.add_special_tokens([AddedToken("[INST]", rstrip=True, special=True)])
    fast.add_tokens(["two"])
    folder = Path(tempfile.mkdtemp())
    fast.enable_truncation(3)
    fast.enable_padding()
    fast.save(str(folder / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "extra_special_tokens": ["two"]}),
        encoding="utf-8",
    )
    return open_tokenizer(folder), fast


def with_special_tokens(
    config: dict[str, Any], special: Sequence[str], plain: Sequence[str] = ()
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """minitune's and transformers' tokenizers of one byte-level folder that has these tokens, special and plain ones."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=letters))
    fast.add_special_tokens(list(special))
    fast.add_tokens(list(plain))
    folder = write_folder(None, {**config, "clean_up_tokenization_spaces": False})
    fast.save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
