"""Keys of a program as its help lists them: value, meaning and type, table by table."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.inspect import StructType

from minitune.io.field_comments import first_sentence
from minitune.io.key_types import Key, keys_of
from minitune.io.toml_messages import KeyPath, types_at
from minitune.io.toml_writing import inline_text
from minitune.programs.program import Program, speller

WIDTH = 80  # columns


def described_keys(raw: Mapping[str, Any]) -> list[str]:
    """Lines on every table that a parsed program holds, with the keys that it leaves out.

    Each kind of table is explained once; of a second one the keys that are written are listed. The
    program need not be a valid one: what is no known table is left out.
    """
    spelled = speller(raw)
    explained: dict[type, str] = {}  # kind of table -> the first one of it
    lines = []
    for path, table in _tables((), raw):
        structs = [info for info in types_at(Program, raw, path) if isinstance(info, StructType)]
        if len(structs) != 1:
            continue
        info, prefix = structs[0], spelled((*path, "key")).removesuffix("key")
        title = prefix.removesuffix(".") or "the program"
        tag = f', {info.tag_field} = "{info.tag}"' if info.tag_field else ""
        first = explained.setdefault(info.cls, title)
        if first == title:
            lines += ["", *textwrap.wrap(f"{title}{tag}: {first_sentence(info.cls)}", WIDTH)]
            lines += [line for key in keys_of(info) for line in _explained(key, prefix, table)]
        else:
            lines += ["", *textwrap.wrap(f"{title}{tag}: its keys are those of {first}.", WIDTH)]
            lines += [_key_line(key, prefix, table) for key in keys_of(info) if key.name in table]
    return lines


def _tables(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Tables of a parsed program with their paths, a table before those inside it."""
    if isinstance(value, Mapping):
        yield path, value
        for key, child in value.items():
            yield from _tables((*path, key), child)
    elif isinstance(value, list):
        for n, child in enumerate(value):
            yield from _tables((*path, n), child)


def _explained(key: Key, prefix: str, table: Mapping[str, Any]) -> list[str]:
    """Key with its value, and below it what it means and what it may be."""
    text = f"{key.meaning} [{key.type}]".lstrip()
    indent = " " * 6
    below = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [_key_line(key, prefix, table), *below]


def _key_line(key: Key, prefix: str, table: Mapping[str, Any]) -> str:
    """Key with the value that the program writes, or with what holds without one."""
    value = ""
    if key.name in table:
        # the keys of a table inside follow in lines of their own
        is_below = key.structs and isinstance(table[key.name], (Mapping, list))
        value = "" if is_below else f" = {inline_text(table[key.name])}"
    elif key.default is None:
        value = "  (must be given)"
    elif key.default:
        value = f"  (default: {key.default})"
    line = f"  {prefix}{key.name}{value}"
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."
