"""TOML text of a tree of plain values."""

import json
import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any


def dumps(tree: Mapping[str, Any], *, absent: bool = False) -> str:
    """TOML text: values first, then a [table] or [[table]] for each nested one, everything deeper
    inline.

    None is left out, or with `absent` a comment `# key =` where a line could be.
    """
    plain, tables = [], []
    for key, value in tree.items():
        name = key_text(key)
        if _is_tables(value):
            tables += [[f"[[{name}]]", *pairs_text(table, absent=absent)] for table in value]
        elif (
            isinstance(value, Mapping)
            and value
            and all(isinstance(part, Mapping) for part in value.values())
        ):
            for part, table in value.items():
                tables += [[f"[{name}.{key_text(part)}]", *pairs_text(table, absent=absent)]]
        elif isinstance(value, Mapping):
            tables += [[f"[{name}]", *pairs_text(value, absent=absent)]]
        else:
            plain += pairs_text({key: value}, absent=absent)
    return "\n\n".join("\n".join(lines) for lines in [plain, *tables] if lines) + "\n"


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(table, Mapping) for table in value)
    )


def pairs_text(table: Mapping[str, Any], *, absent: bool = False) -> list[str]:
    """Lines `key = value` of a table; keys that hold None are left out, or are comments."""
    lines = []
    for key, value in table.items():
        if value is not None:
            lines.append(f"{key_text(key)} = {inline_text(value)}")
        elif absent:
            lines.append(f"# {key_text(key)} =")
    return lines


def key_text(key: str) -> str:
    """TOML of a key, quoted where it has to be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else inline_text(key)


def inline_text(value: Any) -> str:
    """TOML of a value on one line; TypeError for what TOML has no form for."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON's escapes are TOML's, but for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case int():
            return str(value)
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case date() | datetime() | time():
            return value.isoformat()
        case Mapping():
            return f"{{ {', '.join(pairs)} }}" if (pairs := pairs_text(value)) else "{}"
        case list() | tuple():
            return "[" + ", ".join(inline_text(item) for item in value) + "]"
    raise TypeError(
        f"toml: {value!r} ({type(value).__name__}) has no TOML form, expected str, number, bool, "
        "array or table"
    )
