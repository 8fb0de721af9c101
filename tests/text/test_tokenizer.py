"""Ids against transformers and tokenizers, special tokens only where asked for, and every error message."""

import builtins
import json
import random
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from minitune.errors import InputError
from minitune.io import paths
from minitune.text.folder_files import TOKENIZER_FILES, tokenizer_fingerprint
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from support.tokenizers import CHAT_TOKENS, byte_level, llama, llama_config, sentencepiece_model, texts, wild, write_folder


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dummy_prefix", [False, True])
@given(text=texts)
def test_sentencepiece_ids_and_text_equal_transformers(dummy_prefix: bool, legacy: bool, text: str) -> None:
    ours, theirs = llama(dummy_prefix, legacy)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, parse_special=True) == ids
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


def test_dummy_prefix_is_what_makes_the_difference() -> None:
    with_prefix, without = llama(True)[0], llama(False)[0]
    assert with_prefix.encode("apples", parse_special=False) != without.encode("apples", parse_special=False)


@given(text=texts)
def test_user_defined_symbols_equal_transformers(text: str) -> None:
    model = sentencepiece_model(True, ("\n", "two"))
    ours, theirs = _user_defined(model)
    assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)


@cache
def _user_defined(model: bytes) -> tuple[Tokenizer, LlamaTokenizer]:
    folder = write_folder(model, llama_config())
    return open_tokenizer(folder), LlamaTokenizer.from_pretrained(folder)


@given(text=texts)
def test_tokenizer_json_equals_the_package(text: str) -> None:
    ours, theirs = byte_level()
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, parse_special=True) == ids
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


@given(text=texts)
def test_tokenizer_json_with_dummy_prefix_equals_transformers_and_the_model_file(text: str) -> None:
    ours, theirs, of_model = _saved_by_transformers()
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, parse_special=True) == ids
    assert ours.encode_span(text, starts_document=False, restore={}) == of_model.encode_span(
        text, starts_document=False, restore={}
    )


@cache
def _saved_by_transformers() -> tuple[Tokenizer, PreTrainedTokenizerFast, Tokenizer]:
    of_model, theirs = llama(True)
    folder = Path(tempfile.mkdtemp())
    theirs.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return open_tokenizer(folder), theirs, of_model


@pytest.mark.parametrize("first", [normalizers.Prepend("▁"), normalizers.Sequence([normalizers.Prepend("▁"), normalizers.NFC()])])
def test_a_prepending_normalizer_acts_where_a_document_opens(first: Any, tmp_path: Path) -> None:
    fast = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "<s>": 2}, []))
    fast.normalizer = first
    fast.add_special_tokens(["<s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(tmp_path)
    assert ours.encode("a<s>a", parse_special=True) == fast.encode("a<s>a").ids == [0, 1, 2, 0, 1]
    assert ours.encode_span("a", starts_document=False, restore={}) == [1]


@cache
def _tokenizer(kind: str) -> Tokenizer:
    if kind == "user_defined":  # without tokenizer_config.json: symbols that look like markup are special
        return open_tokenizer(write_folder(sentencepiece_model(True, ("\n", *CHAT_TOKENS)), None))
    return llama()[0] if kind == "llama" else byte_level()[0]


@pytest.mark.parametrize("kind", ["llama", "byte_level", "user_defined"])
@given(text=st.one_of(texts, wild))
def test_plain_text_never_holds_special_tokens_and_comes_back(kind: str, text: str) -> None:
    ours = _tokenizer(kind)
    ids = ours.encode(text, parse_special=False)
    assert not set(ids) & set(ours.special.values())
    # as in transformers, a text that starts with a space gets no second one, and decoding takes one away
    assert ours.decode(ids, skip_special=False) == (text if kind == "byte_level" else text.removeprefix(" "))


@pytest.mark.parametrize("kind", ["llama", "byte_level", "user_defined"])
def test_special_tokens_are_parsed_where_asked_for(kind: str) -> None:
    ours = _tokenizer(kind)
    ids = ours.encode("<|im_start|>user<|im_end|>", parse_special=True)
    assert [ids[0], ids[-1]] == [ours.special["<|im_start|>"], ours.special["<|im_end|>"]]
    assert ours.decode(ids, skip_special=True) == "user"
    assert ours.decode([*ids, ours.vocab_size, 10**6, -1], skip_special=False) == "<|im_start|>user<|im_end|>"


@given(before=wild, after=wild)
def test_a_continued_text_gets_no_second_dummy_prefix(before: str, after: str) -> None:
    ours = llama()[0]
    ids = ours.encode_span("a" + before, starts_document=True, restore={}) + ours.encode_span(
        after, starts_document=False, restore={}
    )
    assert ours.decode(ids, skip_special=False) == "a" + before + after


def test_stand_ins_are_restored_after_special_tokens_were_found() -> None:
    ours = llama()[0]
    text = "<|im_end|>\U00100000|im_end|>"
    ids = ours.encode_span(text, starts_document=False, restore={0x100000: "<"})
    plain = ours.encode_span("\U00100000|im_end|>", starts_document=False, restore={0x100000: "<"})
    assert ids == [ours.special["<|im_end|>"], *plain]
    assert ours.special["<|im_end|>"] not in plain
    assert ours.decode(ids, skip_special=False) == "<|im_end|><|im_end|>"


def test_named_tokens() -> None:
    ours = llama()[0]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size, ours.add_bos) == (1, 2, 2, 386, False)
    assert ours.special_names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert ours.special == {"<unk>": 0, "<s>": 1, "</s>": 2, **{text: 380 + i for i, text in enumerate(CHAT_TOKENS)}}
    config = llama_config(bos_token=None, eos_token="<|im_end|>", pad_token="<|eot_id|>", add_bos_token=True)
    ours = open_tokenizer(write_folder(sentencepiece_model(True), config))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos) == (None, 381, 384, True)
    bare = open_tokenizer(write_folder(sentencepiece_model(True), None))
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.special) == (1, 2, 2, {"<s>": 1, "</s>": 2, "<unk>": 0})
    fast = byte_level()[0]
    assert (fast.decode([fast.bos_id or 0], skip_special=False), fast.eos_id) == ("<|begin_of_text|>", fast.pad_id)


def test_old_folders_name_tokens_in_other_files() -> None:
    folder = write_folder(sentencepiece_model(True), {"additional_special_tokens": ["order"]})
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}', encoding="utf-8")
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 380}', encoding="utf-8")
    ours = open_tokenizer(folder)
    assert (ours.eos_id, ours.vocab_size, ours.decode([380], skip_special=False)) == (380, 381, "<|im_end|>")
    assert "order" not in ours.special  # no piece of the model: its piece is "\u2581order"


@pytest.mark.parametrize("file", TOKENIZER_FILES)
def test_the_fingerprint_changes_with_every_file(file: str) -> None:
    folder = write_folder(sentencepiece_model(True), llama_config())
    before = open_tokenizer(folder)
    assert before.fingerprint == open_tokenizer(folder).fingerprint
    old = (folder / file).read_bytes() if (folder / file).exists() else b"{}"
    (folder / file).write_bytes(sentencepiece_model(False) if file == "tokenizer.model" else old + b"\n")
    assert open_tokenizer(folder).fingerprint != before.fingerprint


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"])
def test_the_fingerprint_changes_with_every_template(file: str) -> None:
    folder = write_folder(sentencepiece_model(True), llama_config())
    seen = {tokenizer_fingerprint(folder)}
    (folder / file).parent.mkdir(exist_ok=True)
    for content in ("{}", "{ }"):
        (folder / file).write_text(content, encoding="utf-8")
        seen.add(tokenizer_fingerprint(folder))
    assert len(seen) == 3


def test_tokenizer_json_stands_in_for_a_model_that_sentencepiece_cannot_read() -> None:
    folder = write_folder(b"IQ== 0\nIg== 1\n", None)
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder).encode("a", parse_special=False) == [0]


@pytest.mark.parametrize("cut", [0, 100, -7])
def test_a_broken_model_is_refused(cut: int) -> None:
    folder = write_folder(sentencepiece_model(True)[:cut], None)
    message = f"tokenizer: {re.escape(str(folder / 'tokenizer.model'))} can't be read .*, expected a sentencepiece model; put"
    with pytest.raises(InputError, match=message):
        open_tokenizer(folder)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither file, expected tokenizer.model or tokenizer.json; copy"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json can't be read .*, expected a JSON object; fetch"),
        ("tokenizer_config.json", b"\xff", r"tokenizer_config\.json can't be read"),
        ("special_tokens_map.json", b"[" * 10**5, r"special_tokens_map\.json can't be read"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json can't be read \(Expected `object`, got `array`\)"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder can't be read .*, expected"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder can't be read"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": {}}}', "added_tokens_decoder can't be read"),
        ("tokenizer_config.json", b'{"eos_token": "<end>"}', "eos_token '<end>' is no token of the vocabulary, expected one"),
    ],
)
def test_broken_settings_are_refused(file: str, content: bytes, message: str) -> None:
    folder = write_folder(sentencepiece_model(True), None)
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=f"tokenizer: {re.escape(str(folder))}.*{message}"):
        open_tokenizer(folder)


def test_a_broken_tokenizer_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer.json .*, expected a tokenizer.json; fetch the file again"):
        open_tokenizer(tmp_path)


def test_without_the_package_tokenizers_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"needs the package tokenizers, which is not installed; pip install 'minitune\[hf\]'"):
        open_tokenizer(tmp_path)


def test_a_mutated_model_is_read_or_refused() -> None:
    model = sentencepiece_model(True)
    rng = random.Random(1)
    refused = 0
    for _ in range(40):
        at = rng.randrange(len(model))
        folder = write_folder(model[:at] + bytes([rng.randrange(256)]) + model[at + 1 :], llama_config())
        try:
            open_tokenizer(folder).encode("an order", parse_special=True)
        except InputError:
            refused += 1
    assert 0 < refused < 40


def with_declared(folder: Path, token_id: int, text: str = "<image_soft_token>", **more: Any) -> Path:
    """Copy of the demo's tokenizer whose configuration declares one more added token."""
    shutil.copytree(paths.locate("demo"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"][str(token_id)] = {"content": text, "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("token_id", [1024, 1100])
def test_a_token_without_a_row_matters_only_in_a_text_that_has_it(token_id: int, tmp_path: Path) -> None:
    more = open_tokenizer(with_declared(tmp_path / "more", token_id))
    fitted = more.with_rows(1024, "here")
    assert fitted.fingerprint != more.fingerprint  # cached tokens of a larger model may hold the token
    assert more.with_rows(token_id + 1, "here") is more
    for text in ("Two lamps", "<image_soft_token>"):
        assert fitted.encode(text, parse_special=False) == more.encode(text, parse_special=False)
    message = f"'<image_soft_token>' is token {token_id}, but the model's embedding has 1024 rows, expected a text without"
    with pytest.raises(InputError, match=message):
        fitted.encode("a <image_soft_token>", parse_special=True)
    with pytest.raises(InputError, match=message):
        fitted.encode_span("<image_soft_token>", starts_document=True, restore={})


def test_a_tokenizer_of_a_larger_vocabulary_or_end_is_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"here has 1024 tokens, more than the model's 1000, .*; are they of two models"):
        open_tokenizer(paths.locate("demo")).with_rows(1000, "here")
    folder = with_declared(tmp_path / "end", 1024, "<|over|>", eos_token="<|over|>")
    with pytest.raises(InputError, match="are they of two models"):
        open_tokenizer(folder).with_rows(1024, "here")
