"""The tokenizer inside a GGUF file: transformers reads the same ids from it; what llama.cpp lacks is left out and said."""

import io
import json
from pathlib import Path
from typing import Any

import gguf as reference
import pytest
import sentencepiece
from gguf.vocab import SentencePieceVocab
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from minitune.errors import InputError
from minitune.interop.gguf import export
from minitune.models import Model
from minitune.models.families import llama
from minitune.text.tokenizer import open_tokenizer
from support.gguf_tokenizers import CUTS, TEXTS, byte_level_folder, sentencepiece_folder, sentencepiece_json_folder, split
from support.tokenizers import CHAT_TOKENS, corpus


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
    folder = byte_level_folder(tmp_path, *CUTS[name], normalizers.NFC() if name == "qwen2" else None)
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
    "a normalizer": (
        lambda folder: byte_level_folder(folder, *CUTS["gpt-2"], normalizers.Lowercase()),
        "normalized by Lowercase",
    ),
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


def test_the_loader_finds_every_key_with_the_type_that_it_asks_for(tmp_path: Path) -> None:
    """The checks of llama.cpp's loader, which stops at a key of another type, for both kinds of tokenizer."""
    wanted = {
        "tokens": reference.GGUFValueType.STRING,
        "merges": reference.GGUFValueType.STRING,
        "scores": reference.GGUFValueType.FLOAT32,
        "token_type": reference.GGUFValueType.INT32,
        "add_bos_token": reference.GGUFValueType.BOOL,
        "add_eos_token": reference.GGUFValueType.BOOL,
        "add_space_prefix": reference.GGUFValueType.BOOL,
    }
    for i, write in enumerate([sentencepiece_folder, lambda folder: byte_level_folder(folder, *CUTS["qwen2"])]):
        (tmp_path / str(i)).mkdir()
        folder = write(tmp_path / str(i))
        exported(folder, 420)
        fields = reference.GGUFReader(folder / "model.gguf").fields
        for name, kind in wanted.items():
            if field := fields.get(f"tokenizer.ggml.{name}"):
                assert field.types[-1] == kind, name
        ids = {fields[key].types[0] for key in fields if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")}
        assert ids == {reference.GGUFValueType.UINT32}
        n_tokens = len(fields["tokenizer.ggml.tokens"].data)
        assert n_tokens == len(fields["tokenizer.ggml.token_type"].data) == 420


def test_sentencepiece_in_a_tokenizer_json_is_the_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    metadata, notes = exported(sentencepiece_json_folder(tmp_path / "a"), 400)
    wanted, _ = exported(sentencepiece_folder(tmp_path / "b"), 400)
    # as AutoTokenizer of transformers 5 reads this folder
    there = "llama.cpp puts a space in front of text behind a special token too"
    assert notes == [f"{there}, this tokenizer at the start alone"]
    for name in ("model", "tokens", "token_type", "add_space_prefix"):
        assert metadata[f"tokenizer.ggml.{name}"] == wanted[f"tokenizer.ggml.{name}"], name
    order = [sorted(range(3, 380), key=lambda i: some["tokenizer.ggml.scores"][i]) for some in (metadata, wanted)]
    merged = [[i for i in ids if len(metadata["tokenizer.ggml.tokens"][i]) > 1 and i > 258] for ids in order]
    assert merged[0] == merged[1]


def test_added_tokens_beyond_the_embedding_are_left_out_and_said(tmp_path: Path) -> None:
    metadata, notes = exported(sentencepiece_folder(tmp_path), 383)
    assert len(metadata["tokenizer.ggml.tokens"]) == 383
    assert [note for note in notes if "left out" in note] == [
        f"token {380 + i} {text!r} left out: the embedding has 383 rows" for i, text in enumerate(CHAT_TOKENS) if i >= 3
    ]
    with pytest.raises(InputError, match="has 380 tokens, expected at most 379, the rows of the embedding"):
        exported(tmp_path, 379)


def test_a_sentencepiece_model_without_bytes_is_said(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=60, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert "the tokenizer has no pieces for bytes" in exported(tmp_path, 60)[1][0]


def test_a_tokenizer_that_differs_from_llama_cpp_in_places_is_said(tmp_path: Path) -> None:
    for name, expected in (("llama-bpe", []), ("qwen2", ["ignore_merges is True: llama.cpp merges the bytes of every word"])):
        (tmp_path / name).mkdir()
        _, notes = exported(byte_level_folder(tmp_path / name, CUTS[name][0], True), 410)
        assert [note.partition(", this tokenizer")[0] for note in notes] == expected
    _, notes = exported(sentencepiece_folder(tmp_path, legacy=False), 400)
    assert notes == ["llama.cpp puts a space in front of text behind a special token too, this tokenizer at the start alone"]


def test_special_tokens_of_phi_3_swallow_the_space_behind_them(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for token in config["added_tokens_decoder"].values():
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    metadata, notes = exported(folder, 400)
    assert (metadata.get("general.name"), [note for note in notes if "swallows" in note]) == ("phi-3", [])
    config["added_tokens_decoder"]["2"]["rstrip"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    metadata, notes = exported(folder, 400)
    assert "general.name" not in metadata
    assert len([note for note in notes if "swallows the whitespace behind it" in note]) == 1


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_transformers_reads_the_tokenizer_from_the_file(kind: str, tmp_path: Path) -> None:
    folder = (
        sentencepiece_folder(tmp_path, legacy=False)
        if kind == "sentencepiece"
        else byte_level_folder(tmp_path, *CUTS["llama-bpe"])
    )
    ours = open_tokenizer(folder)
    exported(folder, ours.vocab_size)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, parse_special=True), text
