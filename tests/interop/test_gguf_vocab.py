"""The tokenizer inside a GGUF file: transformers reads the same ids from it; what llama.cpp lacks is left out and said."""

import io
import json
from pathlib import Path
from typing import Any

import gguf as reference
import pytest
import sentencepiece
import tokenizers
from gguf.vocab import SentencePieceVocab
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minitune.interop.gguf import export
from minitune.models import Model
from minitune.models.families import llama
from minitune.text.tokenizer import open_tokenizer
from support.tokenizers import CHAT_TOKENS, corpus, llama_config, sentencepiece_model

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "send two pears to Berlin",
    " a  b\n\nc",
    "12 boxes, please! It's é 日本 🙂",
    "<|im_start|>user\nAnna<|im_end|>\n",
    "x1234y",
]


def sentencepiece_folder(folder: Path, user_defined: tuple[str, ...] = (), **changes: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(True, user_defined))
    (folder / "tokenizer_config.json").write_text(json.dumps(llama_config(add_bos_token=True, **changes)), encoding="utf-8")
    return folder


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


CUTS = {
    "llama-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def byte_level_folder(folder: Path, cut: Any, normalizer: Any = None, model: Any = None) -> Path:
    fast = tokenizers.Tokenizer(models.BPE())
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


def exported(folder: Path, n_rows: int) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a file for a small model with this tokenizer, and the notes."""
    config = llama.Config(
        n_layers=1, n_heads=1, n_kv_heads=1, d_model=2, d_head=2, d_ff=2, vocab_size=n_rows, rope_theta=10.0, max_positions=8
    )
    model = Model(llama.FAMILY, config)
    path = folder / "model.gguf"
    notes = export.save(
        path, model.init(0), model, export.Types("F32"), tokenizer=folder, template="{{ bos_token }}", stop_ids=[2, 381]
    )
    return {name: field.contents() for name, field in reference.GGUFReader(path).fields.items()}, notes


def test_sentencepiece_pieces_scores_and_kinds(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    metadata, notes = exported(folder, 400)
    assert notes == []
    pieces = [(text.decode(), score, int(kind)) for text, score, kind in SentencePieceVocab(folder).all_tokens()]
    added = [(text, -1000.0, 3) for text in CHAT_TOKENS]
    unused = [(f"[PAD{i}]", -1000.0, 5) for i in range(386, 400)]
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert list(zip(*columns, strict=True)) == [*pieces, *added, *unused]
    assert {
        name: metadata[f"tokenizer.ggml.{name}"] for name in ("model", "add_space_prefix", "add_bos_token", "add_eos_token")
    } == {
        "model": "llama",
        "add_space_prefix": True,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding", "eot")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": None, "eot": 381}
    assert metadata["tokenizer.chat_template"] == "{{ bos_token }}"


def test_user_defined_pieces_and_a_model_without_a_dummy_prefix(tmp_path: Path) -> None:
    metadata, _ = exported(sentencepiece_folder(tmp_path, ("<user>", "\u2581\u2581"), add_prefix_space=False), 386)
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<user>"], kinds["  "], kinds["<s>"], kinds["<unk>"], kinds["<0x0A>"]) == (4, 4, 3, 2, 6)
    assert metadata["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_tokenizers_come_back_with_the_same_ids(name: str, tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, CUTS[name], normalizers.NFC() if name == "qwen2" else None)
    ours = open_tokenizer(folder)
    metadata, notes = exported(folder, ours.vocab_size + 3)
    assert notes == []
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", name)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert metadata["tokenizer.ggml.merges"] == [" ".join(merge) for merge in spec["model"]["merges"]]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert all(tokens[i] == text for text, i in spec["model"]["vocab"].items())
    kinds = dict(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[text] for text in (*CHAT_TOKENS, "two apples", "a")] == [*[3] * len(CHAT_TOKENS), 4, 1]
    assert tokens[-3:] == [f"[PAD{i}]" for i in range(ours.vocab_size, ours.vocab_size + 3)]
    assert "tokenizer.ggml.scores" not in metadata


LACKING = {
    "another split": (lambda folder: byte_level_folder(folder, split(r"\p{L}+|\s+")), "cut by"),
    "a prefix": (lambda folder: byte_level_folder(folder, pre_tokenizers.ByteLevel(add_prefix_space=True)), "cut by"),
    "no bytes": (lambda folder: byte_level_folder(folder, pre_tokenizers.Digits(individual_digits=True)), "cut by"),
    "a normalizer": (lambda folder: byte_level_folder(folder, CUTS["gpt-2"], normalizers.Lowercase()), "normalized by Lowercase"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_llama_cpp_lacks_is_left_out_and_said(name: str, tmp_path: Path) -> None:
    write, message = LACKING[name]
    metadata, notes = exported(write(tmp_path), 500)
    assert metadata["tokenizer.ggml.model"] == "none"
    assert not any(key.startswith("tokenizer.ggml.") for key in metadata.keys() - {"tokenizer.ggml.model"})
    assert len(notes) == 1
    assert message in notes[0]
    assert "takes token ids only" in notes[0]


def test_a_unigram_model_is_left_out_and_said(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert "is a unigram model, expected BPE" in exported(tmp_path, 100)[1][0]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_transformers_reads_the_tokenizer_from_the_file(kind: str, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path) if kind == "sentencepiece" else byte_level_folder(tmp_path, CUTS["llama-bpe"])
    ours = open_tokenizer(folder)
    exported(folder, ours.vocab_size)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, parse_special=True), text
