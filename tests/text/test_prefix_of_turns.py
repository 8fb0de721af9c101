"""Ids of a chat equal AutoTokenizer's wherever tokenizer.model, tokenizer.json and the config say which text gets a prefix."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from minitune.text.chat import encode_chat, encode_prompt, open_template
from minitune.text.tokenizer import open_tokenizer
from support.tokenizers import sentencepiece_model

MARKUP = ["<|user|>", "<|assistant|>", "<|end|>"]
STARTS = [
    "two pears",
    " two pears",
    "  two pears",
    "\n two",
    " ",
    "",
    "\u2581two",
    "<|user|>two<|end|> pears",
    "<|user|> two<|end|>\n pears<|end|>",
    " <|user|>two",
    "a<|user|>  two",
]
SAID = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "pears"}]


@cache
def pieces(model: bytes) -> dict[str, int]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {processor.id_to_piece(i): i for i in range(len(processor))}


def fast(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """A tokenizer.json as Llama 2 and its kin have it: U+2581 in front of every stretch of text."""
    merges = [(p[:k], p[k:]) for p in vocabulary for k in range(1, len(p)) if p[:k] in vocabulary and p[k:] in vocabulary]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Replace("\u2581", " ")
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False, rstrip=True) for name in MARKUP])
    return made


@pytest.mark.parametrize("files", ["both", "json", "model"])
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("family", ["phi3", "mistral", "llama"])
@pytest.mark.parametrize("after_role", ["\\n", ""])
def test_ids_equal_those_of_transformers(family: str, legacy: bool | None, files: str, after_role: str, tmp_path: Path) -> None:
    model = sentencepiece_model(True)
    vocabulary = pieces(model)
    added = {
        str(len(vocabulary) + n): {
            "content": name,
            "special": True,
            "rstrip": True,
            "lstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for n, name in enumerate(MARKUP)
    }
    template = (
        f"{{% for m in messages %}}{{{{ '<|' + m.role + '|>{after_role}' + m.content + '<|end|>{after_role}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '<|assistant|>{after_role}' }}}}{{% endif %}}"
    )
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "chat_template": template,
        "added_tokens_decoder": added,
    }
    if legacy is not None:
        config["legacy"] = legacy
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if files != "model":
        fast(vocabulary).save(str(tmp_path / "tokenizer.json"))
    if files != "json":
        (tmp_path / "tokenizer.model").write_bytes(model)

    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    opened = open_template(tmp_path, ours)
    found = encode_chat(ours, opened, SAID)
    assert found.ids == theirs.apply_chat_template(SAID, tokenize=True, return_dict=False)
    assert found.ids[: list(found.mask).index(True)] == encode_prompt(ours, opened, SAID[:1])
    for text in STARTS:
        assert ours.encode(text, parse_special=True) == theirs(text, add_special_tokens=False)["input_ids"]
