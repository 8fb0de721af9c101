"""Formats of rows: the columns of each, and the format that the columns of a file show."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

# Columns that each format reads.
COLUMNS = {
    "instruct": ("instruction", "input", "output", "system", "history", "tools", "weight"),
    "chat": ("messages", "tools", "system", "history", "weight"),
    "text": ("text", "weight"),
    "pairs": ("prompt", "chosen", "rejected", "tools", "system", "history"),
    "unpaired": (
        "prompt",
        "completion",
        "label",
        "chosen",
        "rejected",
        "tools",
        "system",
        "history",
    ),
}
# Those among them that a row of each format has.
REQUIRED = {
    "instruct": ("instruction", "output"),
    "chat": ("messages",),
    "text": ("text",),
    "pairs": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
}


class RowFormat(NamedTuple):
    """Format of a data table, and the names that its columns have in the file."""

    format: str
    columns: Mapping[str, str] = MappingProxyType({})


# Columns by which a format is recognised; the first that a row has all of says which it is.
ROW_FORMATS: dict[tuple[str, ...], RowFormat] = {
    ("messages",): RowFormat("chat"),
    ("conversations",): RowFormat("chat"),
    ("prompt", "chosen", "rejected"): RowFormat("pairs"),
    ("chosen", "rejected"): RowFormat("pairs"),
    ("chosen_conversations", "rejected_conversations"): RowFormat("pairs"),
    ("prompt", "completion", "label"): RowFormat("unpaired"),
    ("instruction", "output"): RowFormat("instruct"),
    ("prompt", "completion"): RowFormat("chat"),
    ("instruction", "response"): RowFormat("instruct", {"output": "response"}),
    ("prompt", "response"): RowFormat("instruct", {"instruction": "prompt", "output": "response"}),
    ("question", "answer"): RowFormat("instruct", {"instruction": "question", "output": "answer"}),
    ("query", "response"): RowFormat("instruct", {"instruction": "query", "output": "response"}),
    ("problem", "solution"): RowFormat(
        "instruct",
        {"instruction": "problem", "output": "solution"},
    ),
    ("input", "output"): RowFormat("instruct", {"instruction": "input"}),
    ("text",): RowFormat("text"),
}


def format_of(names: Collection[str]) -> RowFormat | None:
    """Format that the columns of a row show, whatever their case, or None."""
    in_file = {name.casefold(): name for name in names} | {name: name for name in names}
    for needed, shown in ROW_FORMATS.items():
        if not all(name in in_file for name in needed):
            continue
        known = COLUMNS[shown.format]
        roles = {column: role for role, column in shown.columns.items()}
        named = {roles.get(name, name): in_file[name] for name in needed}
        others = [name for name in known if name in in_file and name not in (*named, *needed)]
        named |= {name: in_file[name] for name in others}
        renamed = {role: column for role, column in named.items() if role != column}
        # A name that is no column of the format, such as conversations, can't be renamed.
        if all(role in known for role in renamed):
            return RowFormat(shown.format, renamed)
    return None


def described(formats: Sequence[str]) -> str:
    """Formats with the columns that make their rows: pairs (prompt, chosen and rejected)."""
    return " or ".join(f"{format} ({_listed(REQUIRED[format])})" for format in formats)


def advice(row: Mapping[str, Any], name: str, format: str, columns: Mapping[str, str]) -> str:
    """Return what to do about a row without the column `name` of its format."""
    key = columns.get(name, name)
    inside = next((field for field, rows in row.items() if _holds_rows_with(rows, key)), None)
    if inside is not None:
        return f'its rows are the list "{inside}": write that list alone into the file'
    shown = format_of(row)
    is_known = any(columns.get(one, one) in row for one in COLUMNS[format])
    if shown is not None and shown.format == format and shown.columns:
        return f"write {renaming(shown.columns)}"
    if shown is not None and shown.format != format and not is_known:
        also = f", {renaming(shown.columns)}" if shown.columns else ""
        return f'name its columns with {example(format)}, or write format = "{shown.format}"{also}'
    return f'name the column with columns = {{ {name} = "..." }}'


def renaming(columns: Mapping[str, str]) -> str:
    """Names of columns as a program writes them."""
    pairs = ", ".join(f'{name} = "{column}"' for name, column in columns.items())
    return f"columns = {{ {pairs} }}"


def example(format: str) -> str:
    """Names of a format's columns as a program writes them, with "..." for those in the file."""
    return renaming(dict.fromkeys(REQUIRED[format], "..."))


def _holds_rows_with(value: Any, key: str) -> bool:
    """True for a list of objects, of which the first has a key."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]
    )


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
