"""TOML read with line numbers and decoded into structs."""

import codecs
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from minitune.errors import InputError
from minitune.io.toml_messages import PLAIN, Hints, KeyPath, explain, shown, types_at
from minitune.io.toml_writing import dumps

T = TypeVar("T")

_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}=,.\n]|[^\s\[\]{}=,.#"\']+',
    re.DOTALL,
)


def read(path: Path, what: str) -> tuple[str, dict[str, Any]]:
    """(the text of a TOML file, its plain tree); InputError, begun by `what` ("program"), for what
    can't be read or parsed.
    """
    try:
        text = _text(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path} can't be read ({error})"
        raise InputError(f"{what}: {found}, expected a TOML file in UTF-8") from None
    return text, parse(text, f"{what}: {path}")


def opening_comment(path: Path, what: str) -> list[str]:
    """Lines of the comment at the top of a TOML file; what: the word that messages start with."""
    lines = []
    for line in read(path, what)[0].splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def _text(data: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 with a byte order mark; with any line ends."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str, what: str) -> dict[str, Any]:
    """Plain tree of a TOML text; InputError, begun by `what` ("program: FILE"), with line and
    column of what is malformed.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{what}: brackets nested too deeply, expected TOML") from None
    # tomllib's own error, and int() on a number with thousands of digits
    except ValueError as error:
        match = re.fullmatch(
            r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL
        )
        if not match:
            raise InputError(f"{what}: {error}, expected TOML") from None
        message, line, column = match.groups()
        line, column = (line, f"column {column}") if line else (text.count("\n") + 1, "end of file")
        raise InputError(f"{what}:{line}: {column}: {message}, expected TOML") from None


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, counted from 1, of every table, key and array element of a valid TOML text."""
    lines: dict[KeyPath, int] = {}
    sizes: dict[KeyPath, int] = {}  # elements so far of each array of tables
    tokens, i, table = list(_tokens(text)), 0, ()
    while i < len(tokens):
        token, line = tokens[i]
        if token == "\n":
            i += 1
        elif token == "[":
            element = tokens[i + 1][0] == "["
            keys, i = _keys(tokens, i + 1 + element)
            table = ()
            for n, key in enumerate(keys):
                table = (*table, key)
                if element and n == len(keys) - 1:
                    sizes[table] = sizes.get(table, 0) + 1
                lines.setdefault(table, line)
                if table in sizes:
                    table = (*table, sizes[table] - 1)
                    lines.setdefault(table, line)
            i += 1 + element
        else:
            i = _pair(tokens, i, table, lines)
    return lines


def decode(
    raw: Mapping[str, Any],
    kind: type[T],
    where: Callable[[KeyPath], str],
    *,
    spelled: Callable[[KeyPath], str] = shown,
    hints: Hints = PLAIN,
) -> T:
    """Struct of a parsed tree; InputError, begun by where(path) ("program: FILE:LINE"), for the
    first misfit.

    spelled: a key path in messages; hints: ends of messages about what is unknown.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise InputError(explain(str(error), raw, kind, where, spelled, hints)) from None


def default_at(kind: Any, raw: Any, path: KeyPath) -> dict[str, Any]:
    """Table that a struct has at a path when nothing is written there: its default as TOML would
    hold it, or an empty one.
    """
    for info in types_at(kind, raw, path[:-1]):
        for field in info.fields if isinstance(info, msgspec.inspect.StructType) else ():
            if field.encode_name == path[-1] and isinstance(field.default, msgspec.Struct):
                return tomllib.loads(dumps(msgspec.to_builtins(field.default)))
    return {}


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line, at = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", at, match.start())
        at = match.start()
        if not match.group().startswith("#"):
            yield match.group(), line


def _keys(tokens: list[tuple[str, int]], i: int) -> tuple[list[str], int]:
    keys = []
    while True:
        token = tokens[i][0]
        keys.append(tomllib.loads(f"key = {token}")["key"] if token[0] in "\"'" else token)
        i += 1
        if tokens[i][0] != ".":
            return keys, i
        i += 1


def _pair(tokens: list[tuple[str, int]], i: int, table: KeyPath, lines: dict[KeyPath, int]) -> int:
    line = tokens[i][1]
    keys, i = _keys(tokens, i)
    for n in range(len(keys)):
        lines.setdefault((*table, *keys[: n + 1]), line)
    return _value(tokens, i + 1, (*table, *keys), lines)  # + 1: over the equals sign


def _value(tokens: list[tuple[str, int]], i: int, path: KeyPath, lines: dict[KeyPath, int]) -> int:
    """Index after the value that begins at i."""
    if tokens[i][0] == "[":
        n, i = 0, i + 1
        while tokens[i][0] != "]":
            if tokens[i][0] in "\n,":
                i += 1
            else:
                lines[(*path, n)] = tokens[i][1]
                n, i = n + 1, _value(tokens, i, (*path, n), lines)
        return i + 1
    if tokens[i][0] == "{":
        i += 1
        while tokens[i][0] != "}":
            i = i + 1 if tokens[i][0] in "\n," else _pair(tokens, i, path, lines)
        return i + 1
    while i < len(tokens) and tokens[i][0] not in (",", "]", "}", "\n"):
        i += 1
    return i
