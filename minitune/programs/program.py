"""Program of a run: one TOML file, complete in itself, decoded into frozen structs before anything
else happens.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from minitune.data.source import Source
from minitune.errors import InputError
from minitune.io import json_schema, toml, toml_messages
from minitune.io.toml_messages import shown
from minitune.io.toml_writing import dumps
from minitune.programs import data_tables, learning_rates
from minitune.programs.field_names import suggest
from minitune.programs.kind_names import example_table, suggest_kind
from minitune.programs.loading import ModelSource
from minitune.programs.log import LogConfig
from minitune.programs.model_paths import spell_out_names
from minitune.programs.overrides import rival, write_override
from minitune.programs.profiling.profile import Profile
from minitune.programs.stages.stage import Stage
from minitune.programs.variables import (
    NO_VARIABLES,
    WrittenStrings,
    as_written,
    plain,
    traced,
    written_strings,
)
from minitune.sharding.mesh import n_sharers
from minitune.types import PositiveInt

# a folder's name on any system, and never one that hides or leaves its folder
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
# devices of Windows, whatever the ending
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)

HINTS = toml_messages.Hints(suggest, suggest_kind, example_table)


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
    profile: Profile | None = None  # steps whose time and memory are recorded, by kind of work
    # float32 matrix products of a CUDA device with factors cut to 10 bits of mantissa: faster, less
    # exact
    tf32: bool = False
    # ranks along each axis on which they stand, { replica = 2, data = 8 }; all on data if absent
    mesh: dict[str, PositiveInt] = msgspec.field(default_factory=dict)
    # how several ranks share the weights: dp (each holds all), fsdp, hsdp, or a table from what a
    # dim of a weight means to the axis that it is cut along, { d_ff = "data", heads = "data" }
    plan: str | dict[str, str] = "dp"
    # a training stage that needs more memory than the device has is refused before anything starts;
    # false: it is tried
    must_fit: bool = True

    @property
    def divides_model(self) -> bool:
        """True if ranks divide the weights, or the tokens of a row, so that all of them have to
        take part in a forward.
        """
        return self.plan != "dp" or n_sharers(self.mesh) > 1


class WrittenProgram(NamedTuple):
    """Program, and its strings with variables as they were written."""

    program: Program
    written: WrittenStrings = NO_VARIABLES

    @property
    def text(self) -> str:
        """TOML of the program as it was written, with every default."""
        return resolved(self.program, written=self.written)


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
    return read(path, overrides).program


def read(
    path: Path, overrides: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> WrittenProgram:
    """Program file decoded as `load` does it, which keeps what its strings were written as.

    variables: by name, in place of those of the environment.
    """
    text, raw = toml.read(path, "program")
    names, given = _stage_names(raw), {}
    for override in overrides:
        key_path = write_override(raw, names, override, Program)
        other = rival(key_path)
        if other in given:
            both = f"{given[other]!r} and {override!r}"
            raise InputError(f"program: {both} on the command line, expected one of them; drop one")
        given[key_path] = override
    places = _Places(path, toml.key_lines(text), given, _stage_names(raw))
    raw = traced(raw, (), places.where, variables)
    spell_out_names(raw)
    data_tables.complete(raw, places.where, given)
    learning_rates.complete(raw, places.where)
    program = toml.decode(plain(raw), Program, places.where, spelled=places.spelled, hints=HINTS)
    _refuse_reserved(program.name, ("name",), places)
    _refuse_bad_names(_stage_names(raw), places)
    return WrittenProgram(program, written_strings(raw))


def resolved(
    program: Program, *, absent: bool = False, written: WrittenStrings = NO_VARIABLES
) -> str:
    """Program as TOML with every default written out; loading it gives an equal program.

    absent: a key without a value is a comment `# key =`, so that a reader finds it.
    written: its strings with variables, which stay as they were written.
    """
    return dumps(as_written(msgspec.to_builtins(program), written), absent=absent)


def schema() -> dict[str, Any]:
    """JSON Schema of a program, for editors and for checks outside of minitune."""
    return learning_rates.with_auto(json_schema.described(Program))


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
                'expected one stage of each name; give it one with name = "..."'
            )


def _refuse_reserved(name: str, path: toml_messages.KeyPath, places: _Places) -> None:
    if _RESERVED.fullmatch(name) or name.endswith("."):
        raise InputError(
            f"{places.where(path)}: {shown(path)} is {name!r}, which Windows can't have as a "
            "folder, expected another name; change it"
        )
