"""Messages that repeat what a file holds: one line that moves no cursor, of bounded length, whatever is in the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from minitune import models
from minitune.cli.failures import failure
from minitune.cli.inspect import summarize
from minitune.data.readers import read_rows
from minitune.errors import MAX_MESSAGE, InputError
from minitune.interop.peft.load import load_adapter
from minitune.io import toml
from minitune.text.chat import open_template
from minitune.text.folder_files import template_texts
from minitune.text.tokenizer import open_tokenizer
from support.models import SMALL
from support.tokenizers import byte_level

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\nminitune: all is well\u202e" * 2000


@given(st.text() | st.just(HOSTILE))
def test_a_message_is_one_printable_line_of_bounded_length(text: str) -> None:
    for error in (InputError(text), InputError(f"room: {text}, expected less")):
        assert str(error).isprintable()
        assert failure(error).message.isprintable()
        assert len(str(error)) <= 10 * MAX_MESSAGE  # a character that does not show is written as up to ten
    short = "room: a name, expected another; correct it"
    assert str(InputError(short)) == short


def config_of(**more: Any) -> dict[str, Any]:
    return {**models.FAMILIES["llama"].to_hf(SMALL), **more}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def a_tokenizer(folder: Path, **settings: Any) -> None:
    byte_level()[1].save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)


def an_adapter(folder: Path, key: str, **fields: Any) -> None:
    save_file({key: torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields})


def a_weight(folder: Path, name: str) -> None:
    write_json(folder / "config.json", config_of())
    save_file({name: torch.ones(2)}, folder / "model.safetensors")


def an_index(folder: Path, name: str) -> None:
    write_json(folder / "config.json", config_of())
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": name}})


def load_model(folder: Path) -> object:
    return models.load(str(folder))


def load_deltas(folder: Path) -> object:
    return load_adapter(folder, names=[])


def load_program(folder: Path) -> object:
    return toml.read(folder / "p.toml", "program")


Case = tuple[Callable[[Path], object], Callable[[Path], object]]
CASES: dict[str, Case] = {
    "a field": (lambda f: write_json(f / "config.json", config_of(**{HOSTILE: 1})), load_model),
    "a value": (lambda f: write_json(f / "config.json", config_of(hidden_act=HOSTILE)), load_model),
    "a family": (lambda f: write_json(f / "config.json", {"model_type": HOSTILE}), load_model),
    "a tensor": (lambda f: a_weight(f, HOSTILE), load_model),
    "a shard": (lambda f: an_index(f, HOSTILE), load_model),
    "a key of an adapter": (lambda f: an_adapter(f, HOSTILE), load_deltas),
    "a field of an adapter": (lambda f: an_adapter(f, "a", **{HOSTILE: 1}), load_deltas),
    "a way to begin": (lambda f: an_adapter(f, "a", init_lora_weights=f"pissa{HOSTILE}"), load_deltas),
    "a pattern": (
        lambda f: an_adapter(f, "base_model.model.a.lora_A.weight", rank_pattern={f"({HOSTILE}": 1}),
        load_deltas,
    ),
    "an end token": (lambda f: a_tokenizer(f, eos_token=HOSTILE), open_tokenizer),
    "a declared token": (lambda f: a_tokenizer(f, added_tokens_decoder={HOSTILE: 1}), open_tokenizer),
    "a template": (
        lambda f: a_tokenizer(f, chat_template=f"{{% {HOSTILE} %}}"),
        lambda f: open_template(f, open_tokenizer(f)),
    ),
    "a template's name": (
        lambda f: a_tokenizer(f, chat_template=[{"name": HOSTILE, "template": ""}]),
        template_texts,
    ),
    "a row": (
        lambda f: (f / "x.jsonl").write_text(f'{{"{HOSTILE}', encoding="utf-8"),
        lambda f: list(read_rows(f / "x.jsonl")),
    ),
    "a program": (lambda f: (f / "p.toml").write_text(f"a = {HOSTILE}", encoding="utf-8"), load_program),
    "a folder": (lambda f: (f / HOSTILE[:20].replace("/", "")).mkdir(), summarize),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_says_reaches_no_terminal(name: str, tmp_path: Path) -> None:
    write, read = CASES[name]
    write(tmp_path)
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 10 * MAX_MESSAGE
