"""Keys of a struct as a user writes them in TOML: type in plain words, default, meaning."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from minitune.io.field_comments import comments_of
from minitune.io.toml_writing import inline_text

# Bounds that only say what a number is stored in; a user meets them nowhere else.
_STORAGE_BOUNDS = (2**31 - 1, 2**31, 2**63 - 1, 1e30, -1e30)


class Key(NamedTuple):
    """One key of a table."""

    name: str
    type: str  # in words: string, integer >= 1, one of "a", "b"
    default: str | None  # as TOML; "" for a key that may be absent, None for one that must be given
    meaning: str
    structs: tuple[inspect.StructType, ...]  # tables that may stand there, in a list or a table too


def keys_of(info: inspect.StructType) -> tuple[Key, ...]:
    """Keys of a table, in the order in which its struct lists them."""
    comments = comments_of(info.cls)
    return tuple(
        Key(
            name=field.encode_name,
            type=in_words(field.type),
            default=_default(field),
            meaning=comments[field.name],
            structs=tuple(structs_in(field.type)),
        )
        for field in info.fields
    )


def structs_in(info: inspect.Type) -> Iterator[inspect.StructType]:
    """Structs that a value of this type may be or hold, without those inside them."""
    match info:
        case inspect.StructType():
            yield info
        case inspect.UnionType():
            for option in info.types:
                yield from structs_in(option)
        case inspect.DictType():
            yield from structs_in(info.value_type)
        case inspect.VarTupleType() | inspect.ListType() | inspect.CollectionType():
            yield from structs_in(info.item_type)


def in_words(info: inspect.Type) -> str:
    """Type of a TOML value in a user's words; None, which TOML lacks, is left out."""
    match info:
        case inspect.UnionType():
            words = [in_words(option) for option in info.types if not _is_none(option)]
            return " or ".join(dict.fromkeys(words))
        case inspect.LiteralType():
            return f"one of {', '.join(inline_text(value) for value in info.values)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"integer{_range(info, whole=True)}"
        case inspect.FloatType():
            return f"number{_range(info, whole=False)}"
        case inspect.StrType():
            return "string"
        case inspect.StructType():
            return "table"
        case inspect.DictType():
            return "table" if _is_any(info.value_type) else f"table of {_many(info.value_type)}"
        case inspect.VarTupleType() | inspect.ListType() | inspect.CollectionType():
            return f"list of {_many(info.item_type)}"
        case inspect.TupleType():
            items = [in_words(item) for item in info.item_types]
            return f"list of {len(items)}: {', '.join(dict.fromkeys(items))}"
        case _:
            return "any value"


def _many(info: inspect.Type) -> str:
    """Plural of a type in words: strings, integers >= 1, tables."""
    words = in_words(info)
    if words.startswith("one of") or words in ("any value", "true or false"):
        return words
    noun, space, rest = words.partition(" ")
    return f"{noun}s{space}{rest}"


def _range(info: inspect.IntType | inspect.FloatType, *, whole: bool) -> str:
    """Bounds of a number, begun by a space; "" without any that a user meets."""
    bounds = {">=": info.ge, ">": info.gt, "<=": info.le, "<": info.lt}
    hidden = (None, *_STORAGE_BOUNDS)
    shown = {sign: bound for sign, bound in bounds.items() if bound not in hidden}
    if whole and ">" in shown:
        shown[">="] = shown.pop(">") + 1
    if whole and "<" in shown:
        shown["<="] = shown.pop("<") - 1
    text = " and ".join(f"{sign} {shown[sign]:g}" for sign in bounds if sign in shown)
    return f" {text}" if text else ""


def _default(field: inspect.Field) -> str | None:
    """Default as TOML writes it; "" for None, None where the key must be given."""
    value = _default_value(field)
    if value is msgspec.NODEFAULT:
        return None
    return "" if value is None else inline_text(_plain(value))


def _default_value(field: inspect.Field) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    """Plain tree, in which a struct has its tag and the keys that differ from its defaults."""
    if not isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    info = inspect.type_info(type(value))
    assert isinstance(info, inspect.StructType)
    tag = {info.tag_field: info.tag} if info.tag_field else {}
    fields = {field.encode_name: getattr(value, field.name) for field in info.fields}
    defaults = {field.encode_name: _default_value(field) for field in info.fields}
    changed = {name: _plain(item) for name, item in fields.items() if item != defaults[name]}
    return {**tag, **changed}


def _is_none(info: inspect.Type) -> bool:
    return isinstance(info, inspect.NoneType)


def _is_any(info: inspect.Type) -> bool:
    return isinstance(info, inspect.AnyType)
