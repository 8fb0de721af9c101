"""Environment variables in the strings of a program: ${NAME}, and $${ for ${ itself.

A variable may hold a token, so whatever leaves the machine has a string as it was written.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from minitune.errors import InputError
from minitune.io.toml_messages import KeyPath, shown

Where = Callable[[KeyPath], str]  # begin of a message on the value at a path
VARIABLE = re.compile(r"\$\$\{|\$\{(\w*)(\}?)")
LONG_ENOUGH = 8  # characters of a value that is looked for in running text: no word by chance
NOT_STORED = "log"  # table of trackers: nothing that a run makes depends on it


class Expanded(str):
    """String with its variables replaced, which keeps the text that was written."""

    written: str
    variables: Mapping[str, str]  # by name, those in it

    @staticmethod
    def of(text: str, written: str, variables: Mapping[str, str]) -> "Expanded":
        """Text that came of what was written."""
        new = Expanded(text)
        new.written, new.variables = written, variables
        return new


WrittenStrings = Mapping[
    KeyPath, Expanded
]  # strings of a program with variables in them, by their path
NO_VARIABLES: WrittenStrings = MappingProxyType({})


def expanded(
    value: Any, path: KeyPath, where: Where, variables: Mapping[str, str] | None = None
) -> Any:
    """Tree with ${NAME} replaced in every string; InputError, which begins with where(path), for a
    variable that is not set.

    variables: by name; those of the environment if absent.
    """
    return plain(traced(value, path, where, variables))


def plain(tree: Any) -> Any:
    """Tree of traced strings as plain ones."""
    if isinstance(tree, dict):
        return {key: plain(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [plain(child) for child in tree]
    return str(tree) if isinstance(tree, Expanded) else tree


def traced(
    value: Any, path: KeyPath, where: Where, variables: Mapping[str, str] | None = None
) -> Any:
    """Tree that `expanded` gives, in which the strings that held variables are Expanded."""
    known = os.environ if variables is None else variables
    if isinstance(value, dict):
        return {key: traced(child, (*path, key), where, known) for key, child in value.items()}
    if isinstance(value, list):
        return [traced(child, (*path, n), where, known) for n, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    used: dict[str, str] = {}
    text = VARIABLE.sub(lambda match: _replacement(match, path, where, known, used), value)
    # bytes of a shell in another encoding
    if not text.isascii() and text != text.encode("utf-8", "ignore").decode("utf-8"):
        raise InputError(f"{where(path)}: {shown(path)} is {text!r}, expected valid UTF-8")
    return Expanded.of(text, value, used) if used else text


def _replacement(
    match: re.Match[str],
    path: KeyPath,
    where: Where,
    known: Mapping[str, str],
    used: dict[str, str],
) -> str:
    """Text in the place of what VARIABLE found, which is noted in `used`."""
    if match.group() == "$${":
        return "${"
    name, brace = match.groups()
    if not (name and brace):
        raise InputError(
            f"{where(path)}: {shown(path)} holds '${{', expected ${{NAME}}; write $${{ for ${{ "
            "itself"
        )
    if name not in known:
        raise InputError(
            f"{where(path)}: {shown(path)} holds ${{{name}}}, expected {name} to be set; export it"
        )
    used[name] = known[name]
    return known[name]


def written_strings(tree: Any, path: KeyPath = ()) -> dict[KeyPath, Expanded]:
    """Strings with variables of a traced tree, by their path.

    Keys called `name` are left out: a name is what folders and pages are called.
    """
    if isinstance(tree, Expanded):
        return {} if path[-1:] == ("name",) else {path: tree}
    if isinstance(tree, dict):
        parts: Iterable[tuple[str | int, Any]] = tree.items()
    else:
        parts = enumerate(tree) if isinstance(tree, list) else ()
    found: dict[KeyPath, Expanded] = {}
    for key, child in parts:
        found |= written_strings(child, (*path, key))
    return found


def as_written(value: Any, written: WrittenStrings = NO_VARIABLES, path: KeyPath = ()) -> Any:
    """Tree as it would be written: each string is itself again once it is expanded.

    A string that came of variables has them again, unless it has changed since.
    """
    if isinstance(value, dict):
        return {key: as_written(child, written, (*path, key)) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_written(child, written, (*path, n)) for n, child in enumerate(value)]
    if not isinstance(value, str):
        return value
    before = written.get(path)
    if before is not None and before == value:
        return before.written
    return value.replace("${", "$${")


def to_store(written: WrittenStrings) -> dict[str, str]:
    """Variables whose values a run keeps, by name: those that its results depend on."""
    stored: dict[str, str] = {}
    for path, text in written.items():
        stored |= {} if path[0] == NOT_STORED else text.variables
    return stored


def hidden(texts: Iterable[str], program: Any, variables: Mapping[str, str]) -> list[str]:
    """Texts in which what a string of a program came to stands as it was written.

    program: as it was written, whose variables have these values.
    """
    values = {value_of(one, variables): one for one in _strings(program) if VARIABLE.search(one)}
    shown_texts = list(texts)
    # a longer one may hold a shorter one
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= LONG_ENOUGH:
            shown_texts = [text.replace(value, values[value]) for text in shown_texts]
    return shown_texts


def value_of(written: str, variables: Mapping[str, str]) -> str:
    """Value of a string of a program; as it was written where a variable of it is not known."""
    try:
        return str(expanded(written, (), lambda _: "", variables))
    except InputError:
        return written


def _strings(tree: Any) -> Iterable[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for child in tree.values():
            yield from _strings(child)
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            yield from _strings(child)
