"""Every kind of tokenizer against transformers on thousands of strings: ids, text, and bos in front of plain text."""

import base64
import io
import itertools
import json
import random
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from minitune.errors import InputError
from minitune.text.ranks import WORD_PATTERN
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from support.tokenizers import WORDS

QWEN2 = WORD_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
PARTS = {
    "words": [*WORDS, "isn't", "they'LL", "IT'S", "Zürich's", "café", "naïve", "we've"],
    "code": [
        "def f(x):",
        "\n    return x",
        "\t\tif (a&&b) {",
        "};\r\n",
        "x[0]+=1;",
        "# -*- ",
        "<html>",
        "</s>",
        "0xFF",
        "a_b.c->d",
        "\\n",
    ],
    "space": [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2028", "       "],
    "numbers": ["0", "7", "12", "345", "1234", "9876543210", "3.14", "1,000", "½", "٣٤٥", "Ⅷ", "10²", "-1e-5", "\uff12\uff10"],
    "emoji": ["🙂", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☃", "🤖🤖"],
    "scripts": [
        "日本語のテキスト",
        "中文",
        "한국어",
        "Привет",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "ไทย",
        "ελληνικά",
        "e\u0301",
        "ﬁ",
        "Ǆ",
        "İ",
        "ß",
    ],
    "marks": [
        "!!!",
        "?",
        "...",
        "—",
        "“",
        "”",
        "@#$%",
        "&amp;",
        "<|",
        "|>",
        "<|eot",
        "_id|>",
        "▁",
        "\x00",
        "\x1b[0m",
        "\ufeff",
        "\ufffd",
    ],
    "special": [*SPECIAL, "[INST]", "<s>", "<unk>", "<|eot_id|", "<|EOT_ID|>"],
}


def corpus(n: int = 3200) -> list[str]:
    """Strings of one kind of part, then of all kinds, with and without spaces between them; drawn with a seed."""
    rng = random.Random(5)
    everything = [part for parts in PARTS.values() for part in parts]
    texts = ["", *everything]
    for kind in itertools.cycle([*PARTS, None, None, None]):
        if len(texts) == n:
            return texts
        parts = rng.choices(PARTS[kind] if kind else everything, k=rng.randint(1, 9))
        texts.append(rng.choice(["", "", " "]).join(parts))
    raise AssertionError


def sentences() -> list[str]:
    """What the small vocabularies of these tests are trained on."""
    rng = random.Random(6)
    parts = [part for kind in ("words", "code", "numbers", "emoji", "scripts") for part in PARTS[kind]]
    return [" ".join(rng.choices(parts, k=12)) for _ in range(500)]


def byte_level(cuts: str, **model: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE as Llama 3 and Qwen 2 have it."""
    fast = tokenizers.Tokenizer(models.BPE(**model))
    split = pre_tokenizers.Split(Regex(cuts), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        sentences(), trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=letters, min_frequency=2)
    )
    return fast


def folder_of(fast: tokenizers.Tokenizer, **config: Any) -> Path:
    folder = Path(tempfile.mkdtemp())
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def llama3() -> tuple[Path, Any]:
    """bos comes from the post-processor alone."""
    fast = byte_level(WORD_PATTERN, ignore_merges=True)
    fast.add_special_tokens(SPECIAL[:5])
    fast.add_tokens([AddedToken("<tool_call>", normalized=False)])
    bos = fast.token_to_id(SPECIAL[0])
    template = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A {SPECIAL[0]} $B:1", special_tokens=[(SPECIAL[0], bos)]
    )
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    folder = folder_of(fast, bos_token=SPECIAL[0], eos_token=SPECIAL[2])
    return folder, PreTrainedTokenizerFast.from_pretrained(folder)


def qwen2() -> tuple[Path, Any]:
    fast = byte_level(QWEN2)
    fast.normalizer = normalizers.NFC()
    fast.add_special_tokens(SPECIAL)
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    folder = folder_of(fast, eos_token="<|im_end|>", bos_token=None, add_bos_token=False)
    return folder, PreTrainedTokenizerFast.from_pretrained(folder)


def ranks() -> tuple[Path, Any]:
    """Meta's own file of a Llama 3 vocabulary; the reference has that vocabulary as a tokenizer.json."""
    fast = byte_level(WORD_PATTERN, ignore_merges=True)
    letters = {letter: byte for byte, letter in enumerate(_bytes_to_letters())}
    lines = {i: bytes(letters[letter] for letter in token) for token, i in fast.get_vocab().items()}
    folder = Path(tempfile.mkdtemp())
    text = "".join(f"{base64.b64encode(lines[i]).decode()} {i}\n" for i in range(len(lines)))
    (folder / "tokenizer.model").write_text(text, encoding="utf-8")
    fast.add_special_tokens(_llama3_special())
    bos = fast.token_to_id(SPECIAL[0])
    fast.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], bos)])
    return folder, PreTrainedTokenizerFast.from_pretrained(folder_of(fast, bos_token=SPECIAL[0], eos_token=SPECIAL[1]))


def _bytes_to_letters() -> list[str]:
    """GPT-2's table, by its own published rule."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + shifted.index(byte)) for byte in range(256)]


def _llama3_special() -> list[str]:
    known = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|reserved_special_token_0|>", 3: "<|reserved_special_token_1|>"}
    known |= {4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    known |= {8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}
    return [known.get(i, f"<|reserved_special_token_{i - 8}|>") for i in range(256)]


def sentencepiece_model(**rules: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, character_coverage=0.99, minloglevel=2, **rules
    )
    return model.getvalue()


def spm_bpe() -> tuple[Path, Any]:
    folder = Path(tempfile.mkdtemp())
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    (folder / "tokenizer.model").write_bytes(
        sentencepiece_model(model_type="bpe", vocab_size=600, byte_fallback=True, allow_whitespace_only_pieces=True, **rules)
    )
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    table = {"0": "<unk>", "1": "<s>", "2": "</s>", **{str(600 + i): text for i, text in enumerate(SPECIAL)}}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "add_bos_token": True,
        "added_tokens_decoder": {i: {"content": text, **flags} for i, text in table.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, LlamaTokenizer.from_pretrained(folder)


def spm_unigram() -> tuple[Path, Any]:
    folder = Path(tempfile.mkdtemp())
    rules = {"normalization_rule_name": "nmt_nfkc", "unk_id": 2, "bos_id": -1, "eos_id": 1, "pad_id": 0}
    (folder / "tokenizer.model").write_bytes(
        sentencepiece_model(model_type="unigram", vocab_size=400, hard_vocab_limit=False, **rules)
    )
    (folder / "spiece.model").write_bytes((folder / "tokenizer.model").read_bytes())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, T5Tokenizer.from_pretrained(folder, extra_ids=0)


def metaspace() -> tuple[Path, Any]:
    """A tokenizer.json of the kind that Gemma and Mistral have: spaces as letters, bytes for what is unknown."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    fast = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *letters])
    fast.train_from_iterator(sentences(), trainer)
    spec = json.loads(fast.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in letters]  # they are pieces
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(SPECIAL)
    folder = folder_of(fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
    return folder, PreTrainedTokenizerFast.from_pretrained(folder)


KINDS: dict[str, Callable[[], tuple[Path, Any]]] = {
    "llama3": llama3,
    "qwen2": qwen2,
    "ranks": ranks,
    "spm_bpe": spm_bpe,
    "spm_unigram": spm_unigram,
    "metaspace": metaspace,
}
ADD_BOS = {"llama3": True, "qwen2": False, "ranks": True, "spm_bpe": True, "spm_unigram": False, "metaspace": False}


@cache
def both(kind: str) -> tuple[Tokenizer, Any]:
    """minitune's tokenizer and transformers'."""
    folder, theirs = KINDS[kind]()
    return open_tokenizer(folder), theirs


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_transformers(kind: str) -> None:
    ours, theirs = both(kind)
    texts = corpus()
    assert len(texts) >= 3000
    encoded = [ours.encode(text, parse_special=True) for text in texts]
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    different = [(text, a, b) for text, a, b in zip(texts, encoded, expected, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(texts)}: {different[:3]}"
    for skip in (False, True):
        shown = [ours.decode(ids, skip_special=skip) for ids in encoded]
        expected = theirs.batch_decode(encoded, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        if kind == "spm_unigram":  # sentencepiece itself takes away all the spaces that a text opens with, not only the first
            shown, expected = [text.lstrip(" ") for text in shown], [text.lstrip(" ") for text in expected]
        different = [(ids, a, b) for ids, a, b in zip(encoded, shown, expected, strict=True) if a != b]
        assert not different, f"{len(different)} of {len(texts)} decoded: {different[:3]}"


@pytest.mark.parametrize("kind", KINDS)
def test_bos_stands_in_front_of_plain_text_where_transformers_puts_it(kind: str) -> None:
    ours, theirs = both(kind)
    ids = theirs("two apples")["input_ids"]
    assert ours.add_bos == (ids[0] == ours.bos_id) == ADD_BOS[kind]


@pytest.mark.parametrize("kind", ["llama3", "metaspace"])
@pytest.mark.parametrize("value", [True, False])
def test_tokenizer_json_alone_says_whether_bos_is_added(kind: str, value: bool) -> None:
    folder, _ = KINDS[kind]()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "add_bos_token": value}), encoding="utf-8")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = open_tokenizer(folder)
    assert ours.add_bos == (theirs("a")["input_ids"][0] == ours.bos_id) == ADD_BOS[kind]


def test_tokenizer_json_is_asked_for_bos_where_the_settings_of_a_model_file_say_nothing() -> None:
    folder, _ = spm_bpe()
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    del settings["add_bos_token"]
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert not open_tokenizer(folder).add_bos
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    (folder / "tokenizer.json").write_text(
        json.dumps({"post_processor": {"type": "TemplateProcessing", "single": single}}), encoding="utf-8"
    )
    assert open_tokenizer(folder).add_bos
    (folder / "tokenizer.json").write_text(json.dumps({"post_processor": None}), encoding="utf-8")
    assert not open_tokenizer(folder).add_bos


def test_ranks_name_their_special_tokens() -> None:
    ours, theirs = both("ranks")
    assert ours.special == {text: theirs.convert_tokens_to_ids(text) for text in _llama3_special()}
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert ours.special_names["pad_token"] == "<|finetune_right_pad_id|>"


def test_a_word_that_is_a_token_is_that_token_however_it_may_be_merged(tmp_path: Path) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"bc", b"abcd"]  # no two tokens make up abcd
    (tmp_path / "tokenizer.model").write_text(
        "".join(f"{base64.b64encode(x).decode()} {i}\n" for i, x in enumerate(tokens)), encoding="utf-8"
    )
    ours = open_tokenizer(tmp_path)
    assert ours.encode("abcd", parse_special=False) == [257]
    assert ours.encode("abcde", parse_special=False) == [ord("a"), 256, ord("d"), ord("e")]


def test_tokenizer_json_goes_before_ranks() -> None:
    folder, _ = qwen2()
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n", encoding="utf-8")
    assert open_tokenizer(folder).encode("two", parse_special=True) == both("qwen2")[0].encode("two", parse_special=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IQ== 0\nIg==\n", r"tokenizer.model:2 can't be read \(.*\), expected a base64 token and its rank; fetch the file again"),
        ("IQ== 0\nI 1\n", r"tokenizer.model:2 can't be read"),
        ("IQ== 0\nIg== x\n", r"tokenizer.model:2 can't be read"),
        ("IQ== 0\nIg== 2\n", r"holds 2 ranks up to 2, expected Llama 3's 128000, each once; put the model's tokenizer.json"),
    ],
)
def test_damaged_ranks_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"^tokenizer: {re.escape(str(tmp_path))}.*{message}"):
        open_tokenizer(tmp_path)
