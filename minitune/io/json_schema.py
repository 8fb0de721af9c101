"""JSON Schema of a struct, in which every key is described by the comment beside its field."""

from typing import Any

import msgspec

from minitune.io.field_comments import comments_of
from minitune.io.key_types import structs_in


def described(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """JSON Schema of a struct and of all that it holds, with descriptions for editors to show.

    A table is described by the docstring of its struct, a key by the comment of its field.
    """
    schema = msgspec.json.schema(kind)
    for struct in tables_of(kind):
        properties = schema["$defs"][struct.cls.__name__]["properties"]
        for name, comment in comments_of(struct.cls).items():
            if comment:
                properties[name]["description"] = comment
    return schema


def tables_of(kind: type[msgspec.Struct]) -> list[msgspec.inspect.StructType]:
    """Structs of a program in the order in which a reader meets them: level by level, each once."""
    info = msgspec.inspect.type_info(kind)
    found: dict[type, msgspec.inspect.StructType] = {}
    level = list(structs_in(info))
    while level:
        new = [struct for struct in level if struct.cls not in found]
        found.update((struct.cls, struct) for struct in new)
        fields = [field for struct in new for field in struct.fields]
        level = [below for field in fields for below in structs_in(field.type)]
    return list(found.values())
