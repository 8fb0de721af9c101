"""Which files of a data set are of which split: as its README declares it, else as their names show."""

from typing import Any

import pytest

from minitune.errors import InputError
from minitune.registry.hub_splits import DataName, files_of, parsed

NAMES = {
    "hf:a/b": DataName("a/b"),
    "hf:a/b:test": DataName("a/b", split="test"),
    "hf:a/b/main": DataName("a/b", config="main"),
    "hf:open-ai/gsm8k.2/main:train": DataName("open-ai/gsm8k.2", config="main", split="train"),
    "hf:a/b@v1.0": DataName("a/b", "v1.0"),
    "hf:a/b@refs/convert/parquet/en:dev": DataName("a/b", "refs/convert/parquet", "en", "dev"),
    "hf:a/b@c0ffee/wiki-2:train_sft": DataName("a/b", "c0ffee", "wiki-2", "train_sft"),
}


@pytest.mark.parametrize("text", NAMES)
def test_a_name_is_a_repository_a_revision_a_config_and_a_split(text: str) -> None:
    assert parsed(text) == NAMES[text]


@pytest.mark.parametrize("text", ["hf:squad", "hf://datasets/a/b", "hf:a/b/c/d", "hf:a/b:", "hf:../b", "hf:a/b@", "hf:a/b:x:y"])
def test_another_spelling_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"hub: 'hf:.*' is no name of a data set, expected hf:OWNER/NAME, and after it @REV"):
        parsed(text)


GSM8K = [f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic") for split in ("test", "train")]
DECLARED = {
    "configs": [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in ("train", "test")]}
        for name in ("main", "socratic")
    ]
}
SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]
CASES: dict[str, tuple[str, list[str], dict[str, Any], list[int]]] = {
    "a config that is named": ("hf:a/b/socratic", GSM8K, DECLARED, [3]),
    "a config and a split": ("hf:a/b/main:test", GSM8K, DECLARED, [0]),
    "folders without a README": ("hf:a/b/main", GSM8K, {}, [1]),
    "a default that is marked": (
        "hf:a/b",
        GSM8K,
        {"configs": [DECLARED["configs"][0], {**DECLARED["configs"][1], "default": True}]},
        [3],
    ),
    "shards by name": ("hf:a/b", SHARDS, {}, [0, 1]),
    "a split by name": ("hf:a/b:test", SHARDS, {}, [2]),
    "one pattern for all": ("hf:a/b", ["x/a.jsonl", "x/y/b.jsonl"], {"configs": [{"data_files": "**/*.jsonl"}]}, [0, 1]),
    "a star stays in its folder": ("hf:a/b", ["x/a.jsonl", "x/y/b.jsonl"], {"configs": [{"data_files": ["x/*.jsonl"]}]}, [0]),
    "several patterns of a split": (
        "hf:a/b:sft",
        ["a.csv", "b.csv", "c.csv"],
        {"configs": [{"data_files": [{"split": "sft", "path": ["c.csv", "./a.csv"]}, {"split": "other", "path": "b.csv"}]}]},
        [0, 2],
    ),
    "splits as a table": ("hf:a/b:val", ["a.csv", "b.csv"], {"configs": {"data_files": {"train": "a.csv", "val": "b.csv"}}}, [1]),
    "a folder of a config": (
        "hf:a/b/en:validation",
        ["en/dev.jsonl", "en/train.jsonl", "de/dev.jsonl"],
        {"configs": [{"config_name": "en", "data_dir": "en"}, {"config_name": "de", "data_dir": "de"}]},
        [0],
    ),
    "names without a split": ("hf:a/b", ["rows-1.jsonl", "rows-2.jsonl"], {}, [0, 1]),
    "the only split": ("hf:a/b", ["test.jsonl"], {}, [0]),
    "a word inside a word": ("hf:a/b", ["contest.jsonl", "restrain.jsonl"], {}, [0, 1]),
    "a README that says nonsense": ("hf:a/b", SHARDS, {"configs": ["x", 3, None]}, [0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_files_of_a_split(name: str) -> None:
    text, files, card, wanted = CASES[name]
    assert files_of(parsed(text), files, card) == [files[i] for i in wanted]


@pytest.mark.parametrize(
    ("text", "files", "card", "message"),
    [
        ("hf:a/b:tset", SHARDS, {}, "a/b has no split 'tset', expected one of train, test; did you mean 'test'"),
        ("hf:a/b", GSM8K, DECLARED, "a/b has several configs, expected one of main, socratic; write it after the name, /CONFIG"),
        ("hf:a/b/mian", GSM8K, DECLARED, "a/b has no config 'mian', expected one of main, socratic; did you mean 'main'"),
        ("hf:a/b", ["dev.csv", "test.csv"], {}, "a/b has no split 'train', expected one of validation, test"),
        ("hf:a/b", SHARDS, {"configs": [{"data_files": "x*"}]}, "a/b has no split 'train', expected one of none"),
        ("hf:a/b", [], {}, "a/b holds no file of rows, expected jsonl, .* is hf:a/b@refs/convert/parquet"),
    ],
)
def test_what_there_is_not_is_answered_by_what_there_is(text: str, files: list[str], card: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"hub: {message}"):
        files_of(parsed(text), files, card)
