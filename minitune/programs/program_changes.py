"""Comparison of a run's program with the one that is to continue it: which stages' work still
holds. docs/runs.md says in words what follows from it."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from minitune.io.toml_messages import KeyPath, shown
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.save import Save
from minitune.programs.stages.stage import Stage

TomlTable = Mapping[str, Any]

# key of every model that changes nothing of what is computed: where its blocks lie
OFFLOAD = "offload"
# keys of a program that change nothing of a run
NOT_THE_RUN = ("log", "profile", "resume", "out", "name", "must_fit", "mesh", "plan")
KINDS = MappingProxyType({kind.__struct_config__.tag: kind for kind in get_args(Stage)})
# Keys under whose change a training stage goes on from its newest state.
LONGER = ("steps", "epochs", "evaluate")


class Changes(NamedTuple):
    """Part of a run's work that still holds under another program."""

    finished: frozenset[str]  # stages whose record holds
    states: frozenset[str]  # stages whose saved states hold, so that they can go on from them
    first: str | None  # difference in words; None if the work is the same
    retrains: bool  # the model will be another one


class _Stage(NamedTuple):
    """Stage as it is compared: without the keys that do not count, and with the data it reads."""

    label: str
    observes: bool
    n_makers: int  # stages before it that change the model
    table: TomlTable
    data: TomlTable  # by name, what it works on
    heldout: Any  # what a training stage evaluates on


def compare(
    before: TomlTable,
    now: TomlTable,
    taken: Mapping[str, int],
    again: Set[str],
) -> Changes:
    """Changes from one program to another, both as resolved TOML.

    taken: by training stage, the steps that its newest state has behind it; fewer steps than that
    are another training. again: stages that are to go on though their tables are the same.
    """
    apart = (*NOT_THE_RUN, "stage", "data")
    first = _difference(_without(before, apart), _without(now, apart), ())
    if first is not None:
        return Changes(frozenset(), frozenset(), first, retrains=True)
    old, new = list(_stages(before)), list(_stages(now))
    makers = _makers(old, new, taken, again)
    finished, differences = _observers(old, new, len(makers.same))
    found = next((text for text in (makers.difference, *differences) if text), None)
    finished |= set(makers.same)
    return Changes(
        frozenset(finished),
        frozenset((*makers.same, *makers.going_on)),
        found,
        retrains=makers.difference is not None,
    )


class _Makers(NamedTuple):
    """Stages that change the model: the same up to some place, and then perhaps one to go on."""

    same: list[str]
    going_on: list[str]
    difference: str | None


def _makers(
    old: Sequence[_Stage],
    new: Sequence[_Stage],
    taken: Mapping[str, int],
    again: Set[str],
) -> _Makers:
    old = [stage for stage in old if not stage.observes]
    new = [stage for stage in new if not stage.observes]
    same: list[str] = []
    for a, b in zip(old, new, strict=False):
        found = _stage_difference(a, b)
        if found is not None or b.label in again:
            going_on = [b.label] if _goes_on(a, b, taken.get(b.label, 0)) else []
            return _Makers(same, going_on, found or f"{b.label} was ended early there")
        same.append(b.label)
    difference = _only(old[len(same) :], "there") or _only(new[len(same) :], "here")
    return _Makers(same, [], difference)


def _observers(
    old: Sequence[_Stage],
    new: Sequence[_Stage],
    n_same: int,
) -> tuple[set[str], list[str]]:
    """(stages that measured or wrote what they would now, differences of the others); n_same:
    stages that change the model and are the same."""
    old_by_label = {stage.label: stage for stage in old}
    finished, differences = set(), []
    for stage in new:
        if not stage.observes:
            continue
        difference = _observer_difference(old_by_label.get(stage.label), stage)
        if difference is not None:
            differences.append(difference)
        elif stage.n_makers <= n_same:
            finished.add(stage.label)
    labels = {stage.label for stage in new}
    gone = _only([stage for stage in old if stage.label not in labels], "there")
    return finished, [*differences, *([gone] if gone else [])]


def _stages(program: TomlTable) -> Iterator[_Stage]:
    tables, data = program["stage"], program.get("data", {})
    n_makers = 0
    for n, table in enumerate(tables):
        kind, label = KINDS.get(table["op"], BaseStage), table.get("name", table["op"])
        # A save that a later stage reads is part of how the model is made.
        observes = kind.observes and not (kind is Save and _reads_run(tables[n + 1 :]))
        free = {"name", *kind.free_keys}
        if table.get("loss", {}).get("kind") == "kto":
            free.discard("micro_batch_size")  # it compares the answers within one
        names = (table.get("data"), table.get("method", {}).get("data"))
        heldout = data.get(table.get("evaluate", {}).get("data"))
        read = {name: data.get(name) for name in names if name is not None}
        yield _Stage(label, observes, n_makers, _without(table, free), read, heldout)
        n_makers += not observes


def _reads_run(value: Any) -> bool:
    """True if a path of the run folder stands somewhere in a value as the source of a model."""
    if isinstance(value, Mapping):
        sources = (value[key] for key in ("model", "teacher") if key in value)
        return any(str(source.get("path", "")).startswith("run/") for source in sources)
    return any(_reads_run(part) for part in value)


def _stage_difference(a: _Stage, b: _Stage) -> str | None:
    if a.label != b.label:
        return f"stage {a.label} stands there where {b.label} stands here"
    return (
        _difference(a.table, b.table, (b.label,))
        or _difference(a.data, b.data, ("data",))
        or _difference(a.heldout, b.heldout, (b.label, "evaluate", "data"))
    )


def _observer_difference(a: _Stage | None, b: _Stage) -> str | None:
    if a is None or not a.observes:
        return f"stage {b.label} stands only here"
    if a.n_makers != b.n_makers:
        return f"stage {b.label} stands at another place"
    return _stage_difference(a, b)


def _goes_on(a: _Stage, b: _Stage, n_taken: int) -> bool:
    """True if a training stage differs in its length and its evaluations alone."""
    if a.label != b.label or _difference(a.data, b.data, ()):
        return False
    rest_before, rest_now = _without(a.table, LONGER), _without(b.table, LONGER)
    if b.table["op"] != "train" or _difference(rest_before, rest_now, ()):
        return False
    if b.table.get("steps"):
        return b.table["steps"] >= n_taken
    return "epochs" not in a.table or b.table["epochs"] >= a.table["epochs"]


def _only(stages: Sequence[_Stage], where: str) -> str | None:
    return f"stage {stages[0].label} stands only {where}" if stages else None


def _without(table: TomlTable, keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _difference(before: Any, now: Any, path: KeyPath) -> str | None:
    """First difference of two values, in words."""
    if type(before) is not type(now) or not isinstance(now, (dict, list)):
        return None if before == now else f"{shown(path)} is {before!r} there and {now!r} here"
    if isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    for key in before | now:
        if key == OFFLOAD:
            continue
        if key not in before or key not in now:
            return f"{shown((*path, key))} stands only {'here' if key in now else 'there'}"
        difference = _difference(before[key], now[key], (*path, key))
        if difference is not None:
            return difference
    return None
