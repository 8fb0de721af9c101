"""Program of a run: one TOML file, complete in itself, decoded into frozen structs before anything
else happens.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from minitune.data.source import Source
from minitune.errors import InputError
from minitune.io import json_schema, toml, toml_messages
from minitune.io.toml_messages import shown, types_at
from minitune.io.toml_writing import dumps
from minitune.programs import data_tables
from minitune.programs.field_names import suggest
from minitune.programs.loading import ModelSource
from minitune.programs.log import LogConfig
from minitune.programs.stages.stage import Stage

# a folder's name on any system, and never one that hides or leaves its folder
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
# devices of Windows, whatever the ending
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
# Two keys of which a stage has one: an override of one takes the place of the other.
EITHER = {"steps": "epochs", "epochs": "steps", "prompt": "data"}
_VARIABLE = re.compile(r"\$\$\{|\$\{(\w*)(\}?)")


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Program that `python -m minitune` runs: a model, its data, and the stages that the model goes
    through, in order.
    """

    # of the run, whose folder is out/name: letters, digits, . _ - and not . or - first
    name: Annotated[str, msgspec.Meta(pattern=rf"^{_PLAIN}(?!\n)$", max_length=100)]
    # seed of every random draw: fresh deltas, order of the data, dropout, sampling
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    out: str = "runs"  # folder of run folders
    # absent: continue an unfinished run of this program, if there is one; true: there must be one;
    # false: start afresh
    resume: bool | None = None
    model: ModelSource  # the model that the first stage begins with
    # data by the name that stages call it by: [data.train], [data.heldout]
    data: dict[str, Source] = msgspec.field(default_factory=dict)
    # the stages in their order, each a table [[stage]] with the op that says what it does
    stage: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1)]
    log: LogConfig = LogConfig()  # what is logged beyond the terminal
    # float32 matrix products of a CUDA device with factors cut to 10 bits of mantissa: faster, less
    # exact
    tf32: bool = False


class _Places(NamedTuple):
    """Origin of each value: a line of the file, or an override."""

    file: Path
    lines: Mapping[toml_messages.KeyPath, int]
    overrides: Mapping[toml_messages.KeyPath, str]
    names: Sequence[str | None]  # of the stages

    def where(self, path: toml_messages.KeyPath) -> str:
        """Begin of a message on the value at a path: its line of the file, or its override."""
        # An override replaced all that the file says below its key, so it comes first.
        for n in range(len(path), 0, -1):
            if path[:n] in self.overrides:
                return f"program: {self.overrides[path[:n]]!r} on the command line"
        for n in range(len(path), 0, -1):
            if path[:n] in self.lines:
                return f"program: {self.file}:{self.lines[path[:n]]}"
            below = [text for at, text in self.overrides.items() if at[:n] == path[:n]]
            if below:  # one of them made this table
                return f"program: {below[0]!r} on the command line"
        return f"program: {self.file}"

    def spelled(self, path: toml_messages.KeyPath) -> str:
        """Key path as it can be typed: train.steps where that is one stage, else stage[2].steps."""
        if path[:1] == ("stage",) and len(path) > 2 and path[2] not in ("op", "name"):
            name = self.names[int(path[1])]
            if name is not None and self.names.count(name) == 1 and re.fullmatch(_PLAIN, name):
                return shown((name, *path[2:]))
        return shown(path)


def load(path: Path, overrides: Sequence[str] = ()) -> Program:
    """Decode a program file, changed by overrides such as "train.optimizer.lr=1e-4"; InputError for
    anything that does not fit.

    An override begins with a stage's name (its op, if it has none) or a top-level key. Its value is
    TOML, or else a plain string. Strings may hold ${NAME} for an environment variable; $${ stands
    for ${.
    """
    text, raw = toml.read(path, "program")
    names, given = _stage_names(raw), {}
    for override in overrides:
        key_path = _override(raw, names, override)
        rival = _rival(key_path)
        if rival in given:
            both = f"{given[rival]!r} and {override!r}"
            raise InputError(f"program: {both} on the command line, expected one of them; drop one")
        given[key_path] = override
    places = _Places(path, toml.key_lines(text), given, _stage_names(raw))
    raw = _expand(raw, (), places)
    if isinstance(raw.get("data"), dict):
        raw["data"] = data_tables.completed(
            raw["data"],
            lambda table, key: places.where(("data", table, key)),
        )
    program = toml.decode(raw, Program, places.where, spelled=places.spelled, suggest=suggest)
    _refuse_reserved(program.name, ("name",), places)
    _refuse_bad_names(_stage_names(raw), places)
    return program


def resolved(program: Program, *, absent: bool = False) -> str:
    """Program as TOML with every default written out; loading it gives an equal program.

    absent: a key without a value is a comment `# key =`, so that a reader finds it.
    """
    return dumps(_escape(msgspec.to_builtins(program)), absent=absent)


def schema() -> dict[str, Any]:
    """JSON Schema of a program, for editors and for checks outside of minitune."""
    return json_schema.described(Program)


def speller(raw: Mapping[str, Any]) -> Callable[[toml_messages.KeyPath], str]:
    """Spelling of key paths of a parsed program as they can be typed: train.steps."""
    return _Places(Path(), {}, {}, _stage_names(raw)).spelled


def _stage_names(raw: Mapping[str, Any]) -> list[str | None]:
    """Name of each stage in overrides, records and summary.json: its name, else its op; None if
    decoding will refuse it.
    """
    tables = raw.get("stage")
    names = []
    for table in tables if isinstance(tables, list) else []:
        name = table.get("name", table.get("op")) if isinstance(table, Mapping) else None
        names.append(name if isinstance(name, str) else None)
    return names


def _refuse_bad_names(names: Sequence[str | None], places: _Places) -> None:
    for n, name in enumerate(names):
        path = ("stage", n, "name")
        if name is None or not re.fullmatch(_PLAIN, name):
            raise InputError(
                f"{places.where(path)}: {shown(path)} is {name!r}, expected letters, digits, . _ -"
            )
        _refuse_reserved(name, path, places)
        if name in Program.__struct_fields__:
            raise InputError(
                f"{places.where(path)}: {shown(path)} is {name!r}, a key of the program; choose "
                "another name"
            )
        # Folders are named after stages, and some systems take Train and train for one folder.
        first = [other and other.casefold() for other in names].index(name.casefold())
        if first != n:
            raise InputError(
                f"{places.where(path)}: stage[{n}] is called {name!r} as stage[{first}] is, "
                "expected one stage of each name; "
                f'give it one with name = "..."'
            )


def _refuse_reserved(name: str, path: toml_messages.KeyPath, places: _Places) -> None:
    if _RESERVED.fullmatch(name) or name.endswith("."):
        raise InputError(
            f"{places.where(path)}: {shown(path)} is {name!r}, which Windows can't have as a "
            "folder, expected another name; "
            "change it"
        )


def _override(raw: dict[str, Any], names: Sequence[str | None], text: str) -> toml_messages.KeyPath:
    """Write the value of one "key.path=value" into the parsed tree and return its path there."""
    what = f"program: {text!r} on the command line"
    key, equals, value = text.partition("=")
    head, *rest = key.strip().split(".")
    tops = [field for field in Program.__struct_fields__ if field != "stage"]
    if not equals or not all((head, *rest)) or head.startswith("-"):
        raise InputError(
            f"{what}, expected KEY=VALUE such as seed=1 or train.steps=100{_meant(text)}"
        )
    if names.count(head) > 1:
        places = ", ".join(f"stage[{n}]" for n, name in enumerate(names) if name == head)
        raise InputError(
            f"{what}: {head} may be {places}, expected one stage of that name; give the others a "
            'name = "..."'
        )
    if head in names and not rest:
        raise InputError(
            f"{what}: {head} is a stage, expected a key of it such as {head}.name=VALUE"
        )
    if head not in names and head not in tops:
        known = [*(name for name in names if name), *tops]
        raise InputError(
            f"{what}: {head} is unknown, expected one of {', '.join(known)}{suggest(head, known)}"
        )

    # Walk to the table that holds the key; what is not written on the way begins as its default.
    top: toml_messages.KeyPath = ()
    table, keys = raw, [head, *rest]
    if head in names:
        top = ("stage", names.index(head))
        table, keys = raw["stage"][names.index(head)], rest
    for n, key in enumerate(keys[:-1], 1):
        at = (*top, *keys[:n])
        table = table.setdefault(key, toml.default_at(Program, raw, at))
        if not isinstance(table, dict):
            typed = ".".join([head, *rest][: n + (head in names)])
            raise InputError(f"{what}: {typed} is no table, expected one that holds {keys[n]}")

    # A number is text where only a string can stand, as in name=2026.
    types = types_at(Program, raw, (*top, *keys))
    text_only = all(
        isinstance(kind, (msgspec.inspect.StrType, msgspec.inspect.NoneType)) for kind in types
    )
    rival = _rival((*top, *keys))
    if rival is not None:
        table.pop(str(rival[-1]), None)
    table[keys[-1]] = _toml_value(value.strip(), text_only and len(types) > 0)
    return (*top, *keys)


def _rival(path: toml_messages.KeyPath) -> toml_messages.KeyPath | None:
    """Key of a stage that can't be there together with this one, or None."""
    if len(path) != 3 or path[0] != "stage" or path[2] not in EITHER:
        return None
    return (*path[:2], EITHER[str(path[2])])


def _meant(text: str) -> str:
    """End of a message about a word that is no KEY=VALUE: what may be meant, or nothing."""
    if text.startswith("--") and len(text) > 2:
        name, _, value = text.removeprefix("--").partition("=")
        return f"; options have no dashes: {name}={value or 'VALUE'}"
    path = Path(text)
    if path.is_dir():
        return f"; for a model write model.path={text}"
    if path.is_file():
        return f"; for data write data.NAME.path={text}"
    return ""


def _toml_value(text: str, text_only: bool) -> Any:
    """Value of a TOML expression, or the text itself where it is none, or where only a string can
    stand (name=2026).
    """
    try:
        parsed = toml.parse(f"value = {text}", "")
    except InputError:
        return text
    if len(parsed) > 1 or (text_only and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _expand(value: Any, path: toml_messages.KeyPath, places: _Places) -> Any:
    """Tree with ${NAME} replaced in every string."""
    if isinstance(value, dict):
        return {key: _expand(child, (*path, key), places) for key, child in value.items()}
    if isinstance(value, list):
        return [_expand(child, (*path, n), places) for n, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match.group() == "$${":
            return "${"
        name, brace = match.groups()
        if not (name and brace):
            raise InputError(
                f"{places.where(path)}: {shown(path)} holds "
                f"'${{', expected ${{NAME}}; write $${{ for ${{ itself"
            )
        if name not in os.environ:
            raise InputError(
                f"{places.where(path)}: {shown(path)} holds ${{{name}}}, expected {name} to be "
                "set; export it"
            )
        return os.environ[name]

    text = _VARIABLE.sub(variable, value)
    # bytes of a shell in another encoding
    if not text.isascii() and text != text.encode("utf-8", "ignore").decode("utf-8"):
        raise InputError(f"{places.where(path)}: {shown(path)} is {text!r}, expected valid UTF-8")
    return text


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape(child) for child in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
