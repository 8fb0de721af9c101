"""Overrides of a program on the command line, such as train.optimizer.lr=1e-4."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.io import toml, toml_messages
from minitune.io.toml_messages import types_at
from minitune.programs.field_names import suggest

# Tables that are given a path as if they were one key, and the key that is meant.
TABLES = {"model": "model.path", "data": "data.train.path"}
# Two keys of which a stage has one: an override of one takes the place of the other.
EITHER = {"steps": "epochs", "epochs": "steps", "prompt": "data"}
YAML_OPTIONS = ("config", "nproc_per_node", "nproc-per-node", "nnodes")  # of `tune run`


def write_override(
    raw: dict[str, Any], names: Sequence[str | None], text: str, kind: type[msgspec.Struct]
) -> toml_messages.KeyPath:
    """Write the value of one "key.path=value" into the parsed tree and return its path there.

    names: of the stages. kind: the struct that the tree is decoded into.
    """
    what = f"program: {text!r} on the command line"
    key, equals, value = text.partition("=")
    head, *rest = key.strip().split(".")
    if not equals or not all((head, *rest)) or head.startswith("-"):
        raise InputError(
            f"{what}, expected KEY=VALUE such as seed=1 or train.steps=100{_meant(text)}"
        )
    _require_known(head, rest, names, kind, what)
    _require_form([head, *rest], value.strip(), what)

    # Walk to the table that holds the key; what is not written on the way begins as its default.
    top: toml_messages.KeyPath = ()
    table, keys = raw, [head, *rest]
    if head in names:
        top = ("stage", names.index(head))
        table, keys = raw["stage"][names.index(head)], rest
    for n, key in enumerate(keys[:-1], 1):
        at = (*top, *keys[:n])
        table = table.setdefault(key, toml.default_at(kind, raw, at))
        if not isinstance(table, dict):
            typed = ".".join([head, *rest][: n + (head in names)])
            raise InputError(f"{what}: {typed} is no table, expected one that holds {keys[n]}")

    path = (*top, *keys)
    parsed = _toml_value(value.strip(), _is_text(kind, raw, path), what)
    other = rival(path)
    if other is not None:
        table.pop(str(other[-1]), None)
    table[keys[-1]] = parsed
    return path


def _require_known(
    head: str,
    rest: Sequence[str],
    names: Sequence[str | None],
    kind: type[msgspec.Struct],
    what: str,
) -> None:
    """InputError unless a key path begins with one stage's name and goes on, or with a key."""
    if names.count(head) > 1:
        places = ", ".join(f"stage[{n}]" for n, name in enumerate(names) if name == head)
        raise InputError(
            f"{what}: {head} may be {places}, expected one stage of that name; give the others a "
            'name = "..."'
        )
    if head in names and not rest:
        raise InputError(
            f"{what}: {head} is a stage, expected a key of it such as {head}.name=VALUE"
        )
    tops = [field for field in kind.__struct_fields__ if field != "stage"]
    if head not in names and head not in tops:
        known = [*(name for name in names if name), *tops]
        raise InputError(
            f"{what}: {head} is unknown, expected one of {', '.join(known)}{suggest(head, known)}"
        )


def _require_form(keys: Sequence[str], value: str, what: str) -> None:
    """InputError for a table that is given a path, and for globs that are given one word."""
    if len(keys) == 1 and keys[0] in TABLES and not value.startswith("{"):
        key = TABLES[keys[0]]
        raise InputError(f"{what}: {keys[0]} is a table, expected a key of it; write {key}={value}")
    if len(keys) > 1 and keys[-1] == "targets" and not value.startswith("["):
        words = [word.strip() for word in value.split(",")]
        globs = ["*_proj.weight" if word == "all-linear" else f"*.{word}.weight" for word in words]
        quoted = ", ".join(f'"{glob}"' for glob in (words if "*" in value else globs))
        raise InputError(
            f"{what}: {value!r} is one text, expected a list of globs of weights; "
            f"write '{'.'.join(keys)}=[{quoted}]'"
        )


def _is_text(kind: type[msgspec.Struct], raw: Any, path: toml_messages.KeyPath) -> bool:
    """True where only a string can stand: a number is text there, as in name=2026."""
    types = types_at(kind, raw, path)
    texts = msgspec.inspect.StrType, msgspec.inspect.NoneType
    return len(types) > 0 and all(isinstance(one, texts) for one in types)


def rival(path: toml_messages.KeyPath) -> toml_messages.KeyPath | None:
    """Key of a stage that can't be there together with this one, or None."""
    if len(path) != 3 or path[0] != "stage" or path[2] not in EITHER:
        return None
    return (*path[:2], EITHER[str(path[2])])


def _meant(text: str) -> str:
    """End of a message about a word that is no KEY=VALUE: what may be meant, or nothing."""
    if text.startswith("--") and len(text) > 2:
        name, _, value = text.removeprefix("--").partition("=")
        if name in YAML_OPTIONS:
            return "; a program is the first word, and has no YAML: docs/from-torchtune.md"
        return f"; options have no dashes: {TABLES.get(name, name)}={value or 'VALUE'}"
    path = Path(text)
    if path.is_dir():
        return f"; for a model write model.path={text}"
    if path.is_file():
        return f"; for data write data.NAME.path={text}"
    return f"; no folder {text} is here" if "=" not in text else ""


def _toml_value(text: str, text_only: bool, what: str) -> Any:
    """Value of a TOML expression, or the text itself where it is none, or where only a string can
    stand (name=2026). InputError for a table or a list that is malformed.
    """
    try:
        parsed = toml.parse(f"value = {text}", "")
    except InputError as error:
        if text_only or not text.startswith(("{", "[")):
            return text
        _, _, reason = str(error).rpartition(": ")  # without the place in a line that nobody wrote
        raise InputError(f"{what}: {reason}; correct the table or the list") from None
    if len(parsed) > 1 or (text_only and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]
