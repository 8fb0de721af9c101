"""Data tables of a program, completed: formats found from the columns, and held-out rows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from minitune.data.readers import first_row
from minitune.data.row_formats import REQUIRED, described, example, format_of, renaming
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.errors import InputError, nearest
from minitune.io.toml_messages import KeyPath
from minitune.programs.data_paths import data_places
from minitune.programs.state import AbstractState

AUTO = "auto"
HELDOUT = "heldout"  # table of the rows that `holdout` keeps apart


def complete(
    raw: dict[str, Any],
    where: Callable[[KeyPath], str],
    given: Collection[KeyPath],
) -> None:
    """Complete the data tables of a parsed program; where(path) begins a message about a value.

    given: paths of the keys that the command line writes.
    """
    tables = raw.get("data")
    if isinstance(tables, dict):

        def is_given(table: str, key: str) -> bool:
            path = ("data", table, key)
            return any(path[:n] in given for n in (1, 2, 3))

        raw["data"] = completed(tables, lambda table, key: where(("data", table, key)), is_given)


def completed(
    tables: Mapping[str, Any],
    where: Callable[[str, str], str],
    is_given: Callable[[str, str], bool],
) -> dict[str, Any]:
    """Tables [data.NAME] as decoding takes them: without holdout, and without format = "auto".

    where(table, key) begins a message about a key, which is_given if the command line writes it.
    InputError for columns that show no format, and for two tables with a holdout.
    """
    whole = _with_heldout_table(tables, where, is_given)
    return {name: _with_format(name, table, where) for name, table in whole.items()}


def _with_heldout_table(
    tables: Mapping[str, Any],
    where: Callable[[str, str], str],
    is_given: Callable[[str, str], bool],
) -> dict[str, Any]:
    """Tables in which that of the held-out rows stands by itself.

    What [data.heldout] does not say is as in the table that has the holdout. Where both the holdout
    and data.heldout.path are written, the one of the command line holds: with a path of its own the
    table takes all rows of that, and with the holdout what the file says of the table is dropped.
    """
    dicts = {name: table for name, table in tables.items() if isinstance(table, dict)}
    asking = [name for name, table in dicts.items() if "holdout" in table]
    if not asking:
        return dict(tables)
    name, *others = asking
    if others or name == HELDOUT:
        found = f"{where(asking[-1], 'holdout')}: data.{asking[-1]}.holdout"
        raise InputError(f"{found} is one too many, expected it in one table; remove it")
    table = {key: value for key, value in tables[name].items() if key != "holdout"}
    fraction, heldout = tables[name]["holdout"], tables.get(HELDOUT, {})
    if fraction == 0 and not isinstance(fraction, bool):
        return {**tables, name: table}  # nothing is kept apart
    _require_share(fraction, f"{where(name, 'holdout')}: data.{name}.holdout")
    if not isinstance(heldout, dict):
        return {**tables, name: table}  # decoding says what is wrong with it
    if "path" in heldout:
        if not _holdout_wins(name, where, is_given):
            return {**tables, name: table, HELDOUT: {**table, **heldout}}
        heldout = {key: value for key, value in heldout.items() if is_given(HELDOUT, key)}
    if "split" in table:
        found = f"{where(name, 'holdout')}: data.{name} has both holdout and split"
        raise InputError(f"{found}, expected one of them; remove one")
    parts = {part: {"fraction": fraction, "part": part} for part in ("train", HELDOUT)}
    return {
        **tables,
        name: {**table, "split": parts["train"]},
        HELDOUT: {**table, "split": parts[HELDOUT], **heldout},
    }


def _require_share(value: Any, found: str) -> None:
    """InputError unless a value is a share; found: the words before it."""
    if not isinstance(value, float) or not 0 < value < 1:
        expected = "expected a share between 0 and 1; 0 keeps no rows apart"
        raise InputError(f"{found} is {value!r}, {expected}")


def _holdout_wins(
    name: str,
    where: Callable[[str, str], str],
    is_given: Callable[[str, str], bool],
) -> bool:
    """True where the command line writes the holdout of a table, and the file data.heldout.path;
    InputError where both stand in one of the two."""
    is_wanted = is_given(name, "holdout")
    if is_wanted == is_given(HELDOUT, "path"):
        found = f"{where(name, 'holdout')}: data.{name}.holdout beside data.{HELDOUT}.path"
        raise InputError(f"{found}, expected one of them; drop the one that is not meant")
    return is_wanted


def _with_format(name: str, table: Any, where: Callable[[str, str], str]) -> Any:
    """Table with the format that its first row shows, where it asks for that."""
    if not isinstance(table, dict) or table.get("format") != AUTO:
        return table
    path = table.get("path")
    if isinstance(path, list) and path:
        path = path[0]
    if not isinstance(path, str):
        return {**table, "format": "text"}  # decoding says what is wrong with the path
    place = data_places(path)[0]
    names = first_row(place).keys()
    shown = format_of(names)
    if shown is not None:
        columns = {**shown.columns, **table.get("columns", {})}
        return {**table, "format": shown.format, **({"columns": columns} if columns else {})}
    raise InputError(
        f"{where(name, 'format')}: data.{name}.format is 'auto', but the first row of {place} has "
        f"the columns {', '.join(names)}, expected names that are known (docs/data.md); "
        f"{_filled_in(name, list(names))}"
    )


def _filled_in(table: str, names: Sequence[str]) -> str:
    """Override to type for columns under unknown names, in the order of the file."""

    def typed(format: str) -> str:
        columns = renaming(dict(zip(REQUIRED[format], names, strict=False)))
        return f"data.{table}.format={format} 'data.{table}.{columns.replace(' = ', '=', 1)}'"

    if len(names) < 2:
        return f"for texts write {typed('text')}"
    words = f"for questions and answers write {typed('instruct')}"
    return f"{words}, for preferences {typed('pairs')}" if len(names) > 2 else words


def _missing(name: str, abstract: AbstractState) -> str:
    """End of a message about a table that there is not."""
    if name == HELDOUT and "train" in abstract.data:
        keep = "data.train.holdout = 0.05 keeps rows apart as that"
        return f"; {keep}, or give data.heldout.path, or drop what asks for it"
    return nearest(name, [*abstract.data])


def require_data(abstract: AbstractState, name: str, label: str, *formats: str) -> Source:
    """Data table that a stage asks for by name; InputError if there is none, or one of another
    format.
    """
    if name not in abstract.data:
        known = ", ".join(abstract.data) or "the program has none"
        raise InputError(
            f"loading: stage {label} asks for data {name!r}, expected a [data] table: "
            f"{known}{_missing(name, abstract)}"
        )
    source = abstract.data[name]
    if source.format not in formats:
        table = _table_of(abstract, name)
        remedy = (
            f'for such rows under other names write data.{table}.format = "{formats[0]}" and its '
            f"{example(formats[0])}"
        )
        if source.format in PREFERENCE_FORMATS:
            remedy = f"the program preference trains on preferences; {remedy}"
        raise InputError(
            f"loading: stage {label} asks for data {table!r}, which has format {source.format!r}, "
            f"expected {described(formats)}; {remedy}"
        )
    return source


def _table_of(abstract: AbstractState, name: str) -> str:
    """Name of the table that a program writes rows in: for those of a holdout, the one that has
    it."""
    split = abstract.data[name].split
    if split is None or split.part == "train":
        return name
    path = abstract.data[name].path
    whole = (other for other, one in abstract.data.items() if one.split and one.path == path)
    return next((other for other in whole if other != name), name)
