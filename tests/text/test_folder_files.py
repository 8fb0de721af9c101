"""Chat templates of a folder by name, wherever it keeps them, against AutoTokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitune.errors import InputError
from minitune.text.chat import open_template
from minitune.text.folder_files import template_texts
from minitune.text.template import render
from minitune.text.tokenizer import open_tokenizer
from support.tokenizers import byte_level

PLAIN = "{% for m in messages %}[D]{{ m['content'] }}{{ eos_token }}{% endfor %}"
TOOLS = "[{{ tools | length }} tools]" + PLAIN.replace("[D]", "[T]")
OLD = PLAIN.replace("[D]", "[old]")
FUNCTION = {"type": "function", "function": {"name": "x", "description": "", "parameters": {"type": "object"}}}
SAID = [{"role": "user", "content": "two"}]


def tokenizer_folder(folder: Path, **settings: Any) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level()[1], bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


def as_files(folder: Path) -> None:
    named = folder / "additional_chat_templates"
    named.mkdir()
    (folder / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    (named / "tool_use.jinja").write_text(TOOLS, encoding="utf-8")
    (named / "rag.jinja").write_text("{{ documents }}", encoding="utf-8")


def as_list(folder: Path) -> None:
    named = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": PLAIN}]
    tokenizer_folder(folder, chat_template=named)


def as_both(folder: Path) -> None:
    tokenizer_folder(folder, chat_template=[{"name": "default", "template": OLD}, {"name": "tool_use", "template": OLD}])
    as_files(folder)


def as_one_file_over_a_list(folder: Path) -> None:
    as_list(folder)
    (folder / "chat_template.jinja").write_text(OLD, encoding="utf-8")


@pytest.mark.parametrize("written", [as_files, as_list, as_both, as_one_file_over_a_list])
@pytest.mark.parametrize("tools", [[], [FUNCTION]], ids=["without tools", "with tools"])
def test_the_template_is_that_of_transformers(written: Callable[[Path], None], tools: list, tmp_path: Path) -> None:
    written(tokenizer_folder(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(SAID, tools=tools or None, tokenize=False)
    template = open_template(tmp_path, open_tokenizer(tmp_path))
    assert render(template, SAID, tools=tools, add_generation_prompt=False) == theirs


def test_the_file_of_an_old_processor_counts_where_there_is_no_other(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": OLD}), encoding="utf-8")
    template = open_template(tmp_path, open_tokenizer(tmp_path))
    assert (template.source, template.origin) == (OLD, f"{tmp_path / 'chat_template.json'} chat_template")
    as_files(tmp_path)
    assert template_texts(tmp_path)["default"].source == PLAIN


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    as_files(tokenizer_folder(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(
        InputError, match=r"has chat templates \['rag', 'tool_use'\], expected one called default; write it to chat_"
    ):
        template_texts(tmp_path)
