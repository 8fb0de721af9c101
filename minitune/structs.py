"""Struct of numbers in certain ranges, which are looked at where one is made in Python too."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, get_type_hints

import msgspec

from minitune.errors import quoted


class CheckedStruct(msgspec.Struct, frozen=True):
    """Struct whose fields have the types and ranges of their annotations, however it is made.

    ValueError names the first field that has not. Where a file is decoded, msgspec has looked
    before and says where.
    """

    def __post_init__(self) -> None:
        for name, kind in _field_types(type(self)):
            value = getattr(self, name)
            # what a tensor holds is not read: a device would be waited for
            if hasattr(value, "shape") and not isinstance(value, Real):
                continue
            try:
                msgspec.convert(_plain(value), kind)
            except msgspec.ValidationError as error:
                expected = str(error).replace("`", "")
                raise ValueError(
                    f"{type(self).__name__}: {name} is {quoted(value)}, "
                    f"{expected[:1].lower()}{expected[1:]}"
                ) from None
        self.check_together()

    def check_together(self) -> None:
        """ValueError for fields that each are in range, and can't stand together."""


def _field_types(kind: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    """(name, annotation) of every field."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((name, hints[name]) for name in kind.__struct_fields__)


def _plain(value: Any) -> Any:
    """Value whose numbers are Python's own, such as a learning rate that numpy computed."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
