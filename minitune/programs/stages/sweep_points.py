"""Points of a sweep: what a training stage writes for each of its adapters, and what follows from
it.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.lora import Lora
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import AbstractState

KEYS = (
    "optimizer.*, schedule.*, clip_norm, lr_factors, decay_factors, seed, lora.rank, lora.alpha, "
    "lora.rslora or lora.dropout"
)
OF_STAGE = ("optimizer", "schedule", "clip_norm", "lr_factors", "decay_factors", "seed")
ALLOWED = (*OF_STAGE, "lora.rank", "lora.alpha", "lora.rslora", "lora.dropout")


class Point(NamedTuple):
    """One adapter of a sweep: its table in the program, and the stage, the Lora fields and the seed
    it asks for.
    """

    table: Mapping[str, Any]
    stage: TrainingStage  # the training stage as it would be written for this adapter alone
    lora: Mapping[str, Any]
    seed: int | None  # of the fresh deltas and of the data's order; None: the program's

    def rule(self, lora: Lora) -> Lora:
        """Rule of this point's deltas, given the stage's own."""
        return msgspec.convert({**msgspec.to_builtins(lora), **self.lora}, Lora)

    def describe(self) -> str:
        """Point in words, such as "optimizer.lr = 0.01, seed = 1"."""
        return ", ".join(f"{key} = {value}" for key, value in self.table.items())

    def numbers(self) -> dict[str, float]:
        """Values of the point that are numbers, for the rows of its metrics."""
        return {key: value for key, value in self.table.items() if isinstance(value, int | float)}


def points(stage: TrainingStage) -> list[Point]:
    """Every adapter that the stage's sweep asks for; InputError for a key or a value that does not
    fit.
    """
    tables = stage.sweep
    if isinstance(tables, Mapping):
        tables = [dict(zip(tables, values, strict=True)) for values in product(*tables.values())]
    if not tables or not all(tables):
        raise InputError(
            f"stages: {stage.label} has an empty sweep, expected at least one value of {KEYS}"
        )
    return [_point(stage, table) for table in tables]


def check(stage: TrainingStage, abstract: AbstractState) -> None:
    """InputError unless the stage trains deltas by a loss of tokens and says on which data the best
    one is found.
    """
    all_points = points(stage)
    if stage.loss.objective != "supervised":
        kind = stage.loss.__struct_config__.tag
        raise InputError(
            f"stages: {stage.label} has a sweep and loss {kind!r}, expected cross_entropy"
        )
    if stage.evaluate is None:
        raise InputError(
            f"stages: {stage.label} has a sweep without evaluate, expected one: it finds the "
            "adapter that goes on"
        )
    if abstract.whole:
        raise InputError(
            f"stages: {stage.label} has a sweep, but {min(abstract.whole)} trains whole, expected "
            "deltas only"
        )
    for point in all_points:
        if point.lora and abstract.lora is not None:
            point.rule(abstract.lora).names(abstract.params)
    plain = [
        point
        for point in all_points
        if all(isinstance(x, int | float | str) for x in point.table.values())
    ]
    if len({tuple(point.table.items()) for point in plain}) < len(all_points):
        raise InputError(
            f"stages: {stage.label} has a sweep with the same point twice, expected each once"
        )


def _point(stage: TrainingStage, table: Mapping[str, Any]) -> Point:
    # Each key is written into the stage's own table (without its sweep), which is then decoded as a
    # program's would be.
    fields: dict[str, Any] = msgspec.to_builtins(stage)
    fields["sweep"] = None
    lora: dict[str, Any] = {}
    try:
        for key, value in table.items():
            head, _, field = key.partition(".")
            if (key if head == "lora" else head) not in ALLOWED:
                raise InputError(f"stages: {stage.label} has {key!r} in its sweep, expected {KEYS}")
            if head == "lora":
                lora[field] = value
            elif head != "seed":
                fields = _with_value(fields, key.split("."), value)
        seed = msgspec.convert(table.get("seed"), int | None)
        msgspec.convert({"rank": 1, "alpha": 1.0, "targets": ["*"], **lora}, Lora)
        return Point(table, msgspec.convert(fields, type(stage)), lora, seed)
    except msgspec.ValidationError as error:
        raise InputError(
            f"stages: {stage.label} has a sweep with {dict(table)}: {error}; correct the value"
        ) from None


def _with_value(fields: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Fields with the value at a path of keys."""
    head, *rest = keys
    return {**fields, head: _with_value(fields.get(head, {}), rest, value) if rest else value}
