"""Runs side by side: where their programs differ, and how far each of them came."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from minitune.programs.page.run_files import RunFiles

LEFT_OUT = ("name", "out", "resume")


class Outcome(NamedTuple):
    """One adapter or run of a comparison."""

    label: str
    changed: Mapping[str, Any]  # keys in which they differ
    heldout_nats: float | None  # the best that was measured
    step: int | None  # at which that was


def keys_of(program: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a decoded program as one types it: {"train.optimizer.lr": 0.005, ...}."""
    keys: dict[str, Any] = {}
    for name, value in program.items():
        if name == "stage":
            for stage in value:
                label = stage.get("name") or stage.get("op")
                keys |= _flat(stage, f"{label}.")
        elif name not in LEFT_OUT:
            keys |= _flat({name: value}, "")
    return keys


def differences(runs: Mapping[str, RunFiles]) -> list[Outcome]:
    """Values of each run under the keys in which they differ, and its best held-out loss."""
    keys = {label: keys_of(run.program) for label, run in runs.items()}
    names = dict.fromkeys(itertools.chain.from_iterable(keys.values()))
    changed = [name for name in names if len({str(own.get(name)) for own in keys.values()}) > 1]
    outcomes = []
    for label, run in runs.items():
        loss, step = _best(run)
        own = {name: keys[label].get(name) for name in changed}
        outcomes.append(Outcome(label, own, loss, step))
    return outcomes


def adapters(record: Mapping[str, Any]) -> list[Outcome]:
    """Adapters of a sweep, as its stage has recorded them; none of another stage."""
    return [
        Outcome(
            f"adapter {i}",
            member.get("point", {}),
            member.get("best_heldout_nats"),
            member.get("best_step"),
        )
        for i, member in enumerate(record.get("adapters") or ())
    ]


def grid(outcomes: list[Outcome]) -> tuple[tuple[str, str], dict[tuple[Any, Any], float]] | None:
    """(two keys, loss at each pair of their values) where outcomes differ in just two keys; None
    otherwise."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.changed))
    measured = [outcome for outcome in outcomes if outcome.heldout_nats is not None]
    if len(keys) != 2 or not measured:
        return None
    across, up = keys
    values: dict[tuple[Any, Any], float] = {}
    for outcome in measured:
        place = (outcome.changed.get(across), outcome.changed.get(up))
        loss = float(outcome.heldout_nats or 0.0)
        values[place] = min(loss, values.get(place, loss))
    return (across, up), values


def _best(run: RunFiles) -> tuple[float | None, int | None]:
    """(lowest held-out loss of training, its step), else the loss of the last evaluation."""
    measured = [
        (row["heldout_loss"], row["step"])
        for rows in run.rows.values()
        for row in rows
        if "heldout_loss" in row
    ]
    if measured:
        return min(measured)
    losses = [one.loss_nats for one in run.typed.values() if one.loss_nats is not None]
    return (losses[-1] if losses else None), None


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            keys |= _flat(value, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = value
    return keys
