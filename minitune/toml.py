"""TOML with line numbers: parse it, decode it into structs with errors that name a place, and write it back."""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from minitune import InputError

KeyPath = tuple[str | int, ...]  # ("stage", 1, "optimizer", "lr"), shown as stage[1].optimizer.lr
T = TypeVar("T")

_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}=,.\n]|[^\s\[\]{}=,.#"\']+',
    re.DOTALL,
)


def read(path: Path, what: str) -> tuple[str, dict[str, Any]]:
    """(the text of a TOML file, its plain tree); InputError, begun by `what` ("program"), for what can't be read or parsed."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what}: {path} can't be read ({error}), expected a TOML file in UTF-8") from None
    return text, parse(text, f"{what}: {path}")


def parse(text: str, what: str) -> dict[str, Any]:
    """The plain tree of a TOML text; InputError, begun by `what` ("program: FILE"), with line and column of what is malformed."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{what}: brackets nested too deeply, expected TOML") from None
    except ValueError as error:  # tomllib's own error, and int() on a number with thousands of digits
        found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
        if not found:
            raise InputError(f"{what}: {error}, expected TOML") from None
        message, line, column = found.groups()
        line, column = (line, f"column {column}") if line else (text.count("\n") + 1, "end of file")
        raise InputError(f"{what}:{line}: {column}: {message}, expected TOML") from None


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, counted from 1, of every table, key and array element of a valid TOML text."""
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


def shown(path: KeyPath) -> str:
    """A key path as it is written in messages: stage[1].optimizer.lr."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def nearest(name: str, known: Sequence[str]) -> str:
    """What ends a message about an unknown name: "; did you mean 'rank'?", or nothing when no known name is near."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def decode(raw: Mapping[str, Any], kind: type[T], where: Callable[[KeyPath], str]) -> T:
    """The struct of a parsed tree; InputError, begun by where(path) ("program: FILE:LINE"), for the first misfit."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise InputError(_explain(str(error), raw, kind, where)) from None


def types_at(kind: Any, raw: Any, path: KeyPath) -> tuple[msgspec.inspect.Type, ...]:
    """What a value at a path may be by its struct's annotations; of a tagged union, the struct whose tag stands in `raw`."""
    return _types_at(msgspec.inspect.type_info(kind), raw, path)


def default_at(kind: Any, raw: Any, path: KeyPath) -> dict[str, Any]:
    """The table that a struct has at a path when nothing is written there: its default as TOML would hold it, or an empty one."""
    for info in types_at(kind, raw, path[:-1]):
        for field in info.fields if isinstance(info, msgspec.inspect.StructType) else ():
            if field.encode_name == path[-1] and isinstance(field.default, msgspec.Struct):
                return tomllib.loads(dumps(msgspec.to_builtins(field.default)))
    return {}


def dumps(tree: Mapping[str, Any]) -> str:
    """TOML text: values first, then a [table] or [[table]] for each nested one, everything deeper inline; None is left out."""
    plain, tables = [], []
    for key, value in tree.items():
        name = _key(key)
        if _is_tables(value):
            tables += [[f"[[{name}]]", *_pairs(table)] for table in value]
        elif isinstance(value, Mapping) and value and all(isinstance(part, Mapping) for part in value.values()):
            tables += [[f"[{name}.{_key(part)}]", *_pairs(table)] for part, table in value.items()]
        elif isinstance(value, Mapping):
            tables += [[f"[{name}]", *_pairs(value)]]
        else:
            plain += _pairs({key: value})
    return "\n\n".join("\n".join(lines) for lines in [plain, *tables] if lines) + "\n"


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line, at = 1, 0
    for found in _TOKEN.finditer(text):
        line += text.count("\n", at, found.start())
        at = found.start()
        if not found.group().startswith("#"):
            yield found.group(), line


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
    """The index after the value that begins at i."""
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


def _explain(error: str, raw: Mapping[str, Any], kind: Any, where: Callable[[KeyPath], str]) -> str:
    text, _, at = error.rpartition(" - at `$")
    text, at = (text, at.rstrip("`")) if text else (error, "")
    path = _key_path(at, error, raw, kind)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        name, known = unknown.group(1), _known(types_at(kind, raw, path), "")
        path = (*path, name)
        return f"{where(path)}: {shown(path)} is unknown, expected one of {', '.join(known)}{nearest(name, known)}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        name = missing.group(1)
        tags = _known(types_at(kind, raw, path), name)
        wanted = f"one of {', '.join(tags)}" if tags else _in_words(types_at(kind, raw, (*path, name)))
        return f"{where(path)}: {shown((*path, name))} is missing, expected {wanted}; add it"
    found = _at(raw, path)
    if text.startswith(("Invalid value", "Invalid enum value")):
        known = _known(types_at(kind, raw, path[:-1]), str(path[-1])) or _known(types_at(kind, raw, path), "")
        return f"{where(path)}: {shown(path)} is {_short(found)}, expected one of {', '.join(known)}{nearest(str(found), known)}"
    if text.startswith("Expected "):
        wanted = text.removeprefix("Expected ").split(", got `")[0].replace(" | null", "").replace("`object`", "`table`")
        return f"{where(path)}: {shown(path)} is {_short(found)}, expected {wanted.replace('`', '')}"
    return f"{where(path)}: {shown(path) + ': ' if path else ''}{text}"  # a struct's own check


def _key_path(at: str, error: str, raw: Mapping[str, Any], kind: Any) -> KeyPath:
    """msgspec's own path, with each `[...]` (a value of a dict, its key not told) found by decoding without the others."""
    path: KeyPath = ()
    for key, index, anything in re.findall(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])", at):
        step = key or (_culprit(path, error, raw, kind) if anything else int(index))
        path = (*path, step)
    return path


def _culprit(path: KeyPath, error: str, raw: Mapping[str, Any], kind: Any) -> str:
    table = _at(raw, path)
    for key in table:
        try:
            msgspec.convert(_replaced(raw, path, {key: table[key]}), kind)
        except msgspec.ValidationError as again:
            if str(again) == error:
                return key
    return "..."


def _replaced(tree: Any, path: KeyPath, value: Any) -> Any:
    if not path:
        return value
    children: dict[Any, Any] = dict(tree.items() if isinstance(tree, Mapping) else enumerate(tree))
    children[path[0]] = _replaced(children[path[0]], path[1:], value)
    return children if isinstance(tree, Mapping) else list(children.values())


def _at(tree: Any, path: KeyPath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _types_at(info: msgspec.inspect.Type, value: Any, path: KeyPath) -> tuple[msgspec.inspect.Type, ...]:
    options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    if isinstance(value, Mapping):
        structs = [option for option in options if isinstance(option, msgspec.inspect.StructType)]
        chosen = [s for s in structs if s.tag_field is not None and value.get(s.tag_field) == s.tag]
        options = tuple(chosen) or options
    if not path:
        return options
    key = path[0]
    below = value.get(key) if isinstance(value, Mapping) else value[int(key)] if isinstance(value, list) else None
    found: tuple[msgspec.inspect.Type, ...] = ()
    for option in options:
        match option:
            case msgspec.inspect.StructType():
                inner = [field.type for field in option.fields if field.encode_name == key]
            case msgspec.inspect.DictType():
                inner = [option.value_type]
            case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
                inner = [option.item_type]
            case _:
                inner = []
        for child in inner:
            found += _types_at(child, below, path[1:])
    return found


def _known(types: Sequence[msgspec.inspect.Type], tag_field: str) -> list[str]:
    """The tags of those structs that have this tag field; without one the fields of the structs, the values of the literals."""
    known: list[str] = []
    for info in types:
        if isinstance(info, msgspec.inspect.StructType):
            if tag_field and info.tag_field == tag_field:
                known.append(str(info.tag))
            elif not tag_field:
                known += [info.tag_field] if info.tag_field else []
                known += [field.encode_name for field in info.fields]
        elif isinstance(info, msgspec.inspect.LiteralType) and not tag_field:
            known += [str(value) for value in info.values]
    return sorted(dict.fromkeys(known))


def _in_words(types: Sequence[msgspec.inspect.Type]) -> str:
    """The kinds of value as msgspec's messages name them: int, float, str, bool, array, table."""
    words = [type(info).__name__.removesuffix("Type").lower() for info in types]
    same = {"struct": "table", "dict": "table", "vartuple": "array", "tuple": "array", "list": "array", "literal": "str"}
    return " or ".join(dict.fromkeys(same.get(word, word) for word in words if word != "none")) or "a value"


def _short(value: Any) -> str:
    if isinstance(value, (Mapping, list)):
        return f"{'a table' if isinstance(value, Mapping) else 'an array'} of {len(value)}"
    text = _inline(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(table, Mapping) for table in value)


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_inline(value)}" for key, value in table.items() if value is not None]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _inline(key)


def _inline(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
        case int():
            return str(value)
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case date() | datetime() | time():
            return value.isoformat()
        case Mapping():
            return f"{{ {', '.join(pairs)} }}" if (pairs := _pairs(value)) else "{}"
        case list() | tuple():
            return "[" + ", ".join(_inline(item) for item in value) + "]"
    raise TypeError(f"toml: {value!r} ({type(value).__name__}) has no TOML form, expected str, number, bool, array or table")
