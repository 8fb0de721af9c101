"""Messages about a TOML file that does not fit its struct: the place, what was found, what was
expected.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from minitune.errors import nearest
from minitune.io.toml_writing import inline_text

KeyPath = tuple[str | int, ...]  # ("stage", 1, "optimizer", "lr"), shown as stage[1].optimizer.lr


def _table_of(field: str, value: str, known: Sequence[str]) -> str | None:
    return f"{{ {field} = {inline_text(value)} }}" if value in known else None


class Hints(NamedTuple):
    """Ends of messages about what is unknown, each from the word that was found and those known.

    table(field, word, known) is the table that a word alone means, { kind = "adamw" }, or None.
    """

    key: Callable[[str, Sequence[str]], str] = nearest
    value: Callable[[str, Sequence[str]], str] = nearest
    table: Callable[[str, str, Sequence[str]], str | None] = _table_of


PLAIN = Hints()


def shown(path: KeyPath) -> str:
    """Key path as it is written in messages: stage[1].optimizer.lr."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(
        "."
    )


def types_at(kind: Any, raw: Any, path: KeyPath) -> tuple[msgspec.inspect.Type, ...]:
    """Types of a value at a path by its struct's annotations; of a tagged union, the struct whose
    tag stands in `raw`.
    """
    return _types_at(msgspec.inspect.type_info(kind), raw, path)


def explain(
    error: str,
    raw: Mapping[str, Any],
    kind: Any,
    where: Callable[[KeyPath], str],
    spelled: Callable[[KeyPath], str],
    hints: Hints,
) -> str:
    """Message for a user from msgspec's message about a tree that does not fit its struct; see
    toml.decode.
    """
    text, _, at = error.rpartition(" - at `$")
    text, at = (text, at.rstrip("`")) if text else (error, "")
    path = _key_path(at, error, raw, kind)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        name, known = unknown.group(1), _known(types_at(kind, raw, path), "")
        path = (*path, name)
        return (
            f"{where(path)}: {spelled(path)} is unknown, expected one of "
            f"{', '.join(known)}{hints.key(name, known)}"
        )
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        name = missing.group(1)
        tags = _known(types_at(kind, raw, path), name)
        wanted = (
            f"one of {', '.join(tags)}" if tags else _in_words(types_at(kind, raw, (*path, name)))
        )
        return f"{where(path)}: {spelled((*path, name))} is missing, expected {wanted}; add it"
    value = _at(raw, path)
    if text.startswith(("Invalid value", "Invalid enum value")):
        known = _known(types_at(kind, raw, path[:-1]), str(path[-1])) or _known(
            types_at(kind, raw, path), ""
        )
        wanted = f"one of {', '.join(known)}{hints.value(str(value), known)}"
        return f"{where(path)}: {spelled(path)} is {_short(value)}, expected {wanted}"
    if text.startswith("Expected "):
        types = types_at(kind, raw, path)
        wanted = _wanted(text.removeprefix("Expected "), value, path, types, hints)
        return f"{where(path)}: {spelled(path)} is {_short(value)}, expected {wanted}"
    return f"{where(path)}: {spelled(path) + ': ' if path else ''}{text}"  # a struct's own check


def _wanted(
    text: str, value: Any, path: KeyPath, types: Sequence[msgspec.inspect.Type], hints: Hints
) -> str:
    """Words for what msgspec expected, and how it is written where the mistake is a common one."""
    wanted = (
        text.split(", got `")[0]
        .replace(" | null", "")
        .replace("`object`", "`table`")
        .replace("`", "")
    )
    if wanted.startswith("str matching regex"):
        return "letters, digits, . _ - and nothing else, . and - not first; change it"
    if wanted.startswith("array") and isinstance(value, Mapping) and len(path) == 1:
        return f"{wanted}; write [[{path[0]}]] in place of [{path[0]}]"
    if wanted.startswith("array") and isinstance(value, str):
        return f"{wanted}; write [{inline_text(value)}]"
    if wanted == "table" and isinstance(value, str):
        return f"{wanted}{_table_hint(value, types, hints)}"
    return wanted


def _table_hint(value: str, types: Sequence[msgspec.inspect.Type], hints: Hints) -> str:
    """End of a message about a word where a table is expected: the table that it means."""
    structs = [info for info in types if isinstance(info, msgspec.inspect.StructType)]
    for field in sorted({info.tag_field for info in structs if info.tag_field}):
        known = _known(types, field)
        table = hints.table(field, value, known)
        return f"; write {table}" if table is not None else hints.value(value, known)
    return ""


def _key_path(at: str, error: str, raw: Mapping[str, Any], kind: Any) -> KeyPath:
    """msgspec's own path, with each `[...]` (a value of a dict, its key not told) found by decoding
    without the others.
    """
    path: KeyPath = ()
    for key, index, anything in re.findall(r"\.(\w+)|\[(\d+)\]|(\[\.\.\.\])", at):
        step = key or (_culprit(path, error, raw, kind) if anything else int(index))
        path = (*path, step)
    return path


def _culprit(path: KeyPath, error: str, raw: Mapping[str, Any], kind: Any) -> str:
    """Key of the table at a path whose value is refused with this message."""
    table = _at(raw, path)
    for key in table:
        # msgspec does not name the keys of a dict: each is decoded alone, until the same message
        # comes.
        alone = _replaced(raw, path, {key: table[key]})
        try:
            msgspec.convert(alone, kind)
        except msgspec.ValidationError as one:
            if str(one) == error:
                return key
    return "..."


def _replaced(tree: Any, path: KeyPath, value: Any) -> Any:
    """Copy of a tree with another value at a path."""
    if not path:
        return value
    children: dict[Any, Any] = dict(tree.items() if isinstance(tree, Mapping) else enumerate(tree))
    children[path[0]] = _replaced(children[path[0]], path[1:], value)
    return children if isinstance(tree, Mapping) else list(children.values())


def _at(tree: Any, path: KeyPath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _types_at(
    info: msgspec.inspect.Type, value: Any, path: KeyPath
) -> tuple[msgspec.inspect.Type, ...]:
    options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    if isinstance(value, Mapping):
        structs = [option for option in options if isinstance(option, msgspec.inspect.StructType)]
        chosen = [s for s in structs if s.tag_field is not None and value.get(s.tag_field) == s.tag]
        options = tuple(chosen) or options
    if not path:
        return options
    key = path[0]
    below = None
    if isinstance(value, Mapping):
        below = value.get(key)
    elif isinstance(value, list):
        below = value[int(key)]
    types: tuple[msgspec.inspect.Type, ...] = ()
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
            types += _types_at(child, below, path[1:])
    return types


def _known(types: Sequence[msgspec.inspect.Type], tag_field: str) -> list[str]:
    """Tags of those structs that have this tag field; without one the fields of the structs, the
    values of the literals.
    """
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
    """Kinds of value as msgspec's messages name them: int, float, str, bool, array, table."""
    words = [type(info).__name__.removesuffix("Type").lower() for info in types]
    same = {
        "struct": "table",
        "dict": "table",
        "vartuple": "array",
        "tuple": "array",
        "list": "array",
        "literal": "str",
    }
    return (
        " or ".join(dict.fromkeys(same.get(word, word) for word in words if word != "none"))
        or "a value"
    )


def _short(value: Any) -> str:
    if isinstance(value, (Mapping, list)):
        return f"{'a table' if isinstance(value, Mapping) else 'an array'} of {len(value)}"
    text = inline_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
