"""Files of a folder that say how texts become tokens: the tokenizer's, and chat templates.

Newer folders have a file for each template: chat_template.jinja, which is called `default`, and
others in additional_chat_templates. Older ones have them in tokenizer_config.json, as a string or
as a list of named ones, and folders of old processors in chat_template.json.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitune.errors import InputError, quoted
from minitune.io.json_file import read_json_object
from minitune.io.paths import is_present

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tekken.json",
)
DEFAULT, TOOL_USE = "default", "tool_use"
SINGLE, PROCESSOR = "chat_template.jinja", "chat_template.json"
ADDITIONAL = "additional_chat_templates"
# what a tokenizer's settings and an old processor's file call it
KEY = "chat_template"


class TemplateText(NamedTuple):
    """Source of a chat template, and the file that it stands in."""

    source: str
    origin: str


def template_texts(folder: Path) -> dict[str, TemplateText]:
    """Chat templates of a folder by name, among them `default`; empty for a folder without one.

    As in transformers, files come before tokenizer_config.json, and chat_template.json counts where
    there is no other. InputError for one that can't be read, and for some without a default.
    """
    config, processor = folder / "tokenizer_config.json", folder / PROCESSOR
    named = dict(_files(folder)) or _of_json(config) or _of_json(processor)
    if named and DEFAULT not in named:
        found = f"chat: {folder} has chat templates {quoted(sorted(named))}"
        raise InputError(f"{found}, expected one called {DEFAULT}; write it to {SINGLE}")
    return named


def text_files(folder: Path) -> list[Path]:
    """Files of a folder that say how texts become tokens: the tokenizer's and chat templates."""
    names = (*TOKENIZER_FILES, SINGLE, PROCESSOR)
    return [folder / name for name in names if (folder / name).is_file()] + _additional(folder)


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 of all that says how texts become tokens: names and contents of its files, and the
    family that config.json names.
    """
    digests: list[Any] = [model_type(folder)]
    for file in text_files(folder):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        digests.append((file.relative_to(folder).as_posix(), digest))
    return hashlib.sha256(repr(digests).encode()).hexdigest()


def model_type(folder: Path) -> Any:
    """Family that config.json names, which some tokenizers are read by; None without one."""
    return read_json_object(folder / "config.json", "tokenizer", optional=True).get("model_type")


def _additional(folder: Path) -> list[Path]:
    """Files of templates other than the default, each of the template's name."""
    return sorted(file for file in (folder / ADDITIONAL).glob("*.jinja") if file.is_file())


def _files(folder: Path) -> Iterator[tuple[str, TemplateText]]:
    """Templates that are files of their own."""
    if is_present(folder / SINGLE):
        yield DEFAULT, TemplateText(_text(folder / SINGLE), str(folder / SINGLE))
    for file in _additional(folder):
        yield file.stem, TemplateText(_text(file), str(file))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"chat: {file} is not UTF-8 ({error})"
        raise InputError(f"{found}, expected a Jinja template; fetch the file again") from None


def _of_json(file: Path) -> dict[str, TemplateText]:
    """Templates under `chat_template` in a file: one string, or a list of named ones."""
    written = read_json_object(file, "chat", optional=True).get(KEY)
    if written is None:
        return {}
    entries = [{"name": DEFAULT, "template": written}] if isinstance(written, str) else written
    named = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            name = str(entry.get("name"))
            which = "" if isinstance(written, str) else f" {name}"
            named[name] = TemplateText(entry["template"], f"{file} {KEY}{which}")
    if DEFAULT not in named:
        found = f"{KEY} is a {type(written).__name__} of {quoted(sorted(named))}"
        expected = f"expected a string or a list of named ones with one called {DEFAULT}"
        raise InputError(f"chat: {file} {found}, {expected}; write it to {SINGLE}")
    return named
