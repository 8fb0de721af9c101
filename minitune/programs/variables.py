"""Environment variables in the strings of a program: ${NAME}, and $${ for ${ itself."""

import os
import re
from collections.abc import Callable
from typing import Any

from minitune.errors import InputError
from minitune.io import toml_messages
from minitune.io.toml_messages import shown

Where = Callable[[toml_messages.KeyPath], str]  # begin of a message on the value at a path
VARIABLE = re.compile(r"\$\$\{|\$\{(\w*)(\}?)")


def expanded(value: Any, path: toml_messages.KeyPath, where: Where) -> Any:
    """Tree with ${NAME} replaced in every string; InputError, which begins with where(path), for a
    variable that is not set.
    """
    if isinstance(value, dict):
        return {key: expanded(child, (*path, key), where) for key, child in value.items()}
    if isinstance(value, list):
        return [expanded(child, (*path, n), where) for n, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    text = VARIABLE.sub(lambda match: _replacement(match, path, where), value)
    # bytes of a shell in another encoding
    if not text.isascii() and text != text.encode("utf-8", "ignore").decode("utf-8"):
        raise InputError(f"{where(path)}: {shown(path)} is {text!r}, expected valid UTF-8")
    return text


def _replacement(match: re.Match[str], path: toml_messages.KeyPath, where: Where) -> str:
    """Text in the place of what VARIABLE found."""
    if match.group() == "$${":
        return "${"
    name, brace = match.groups()
    if not (name and brace):
        raise InputError(
            f"{where(path)}: {shown(path)} holds '${{', expected ${{NAME}}; write $${{ for ${{ "
            "itself"
        )
    if name not in os.environ:
        raise InputError(
            f"{where(path)}: {shown(path)} holds ${{{name}}}, expected {name} to be set; export it"
        )
    return os.environ[name]


def escaped(value: Any) -> Any:
    """Tree whose strings are themselves again once they are expanded."""
    if isinstance(value, dict):
        return {key: escaped(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [escaped(child) for child in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
