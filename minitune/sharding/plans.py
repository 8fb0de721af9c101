"""Named plans: files of configs/plans, each a table from the meaning of a dim to an axis."""

from pathlib import Path

from minitune.errors import InputError, nearest, quoted
from minitune.io import toml
from minitune.io.paths import shipped
from minitune.sharding.placements import Plan


def named_plan(name: str) -> Plan:
    """Plan of configs/plans by its name, such as "fsdp"; InputError for a name without a file."""
    folder = "plans/"
    plans = {
        one.removeprefix(folder): path
        for one, path in shipped("configs").items()
        if one.startswith(folder)
    }
    if name not in plans:
        raise InputError(
            f"sharding: there is no plan {name!r}, expected one of {', '.join(sorted(plans))}, or "
            f'a table such as {{ heads = "data" }}{nearest(name, [*plans])}'
        )
    return read_plan(plans[name])


def read_plan(path: Path) -> Plan:
    """Plan of a file; InputError, with the line, for what is no table of strings."""
    text, table = toml.read(path, "sharding")
    lines = toml.key_lines(text)
    for dim, axis in table.items():
        if not isinstance(axis, str):
            raise InputError(
                f"sharding: {path}:{lines[(dim,)]}: {dim} is {quoted(axis)}, expected the name of "
                'an axis, such as "data"'
            )
    return table
