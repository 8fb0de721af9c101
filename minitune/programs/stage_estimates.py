"""Estimates of training stages before they run: tokens, steps and time.

The time comes from an earlier run of the same program where there is one. Else it is a lower bound:
the floating-point operations at the rate of a matrix product, see docs/decisions/0009.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import msgspec
import torch

from minitune.programs.data_facts import DataFacts
from minitune.programs.loading import device_and_dtype
from minitune.programs.plan import planned
from minitune.programs.program import Program
from minitune.programs.records import read_rows
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_notes import n_steps
from minitune.programs.state import AbstractState

WIDTH, N_PRODUCTS = 1024, 5  # of the matrices that are multiplied, and how often


class StageEstimate(msgspec.Struct, frozen=True):
    """Estimate of one training stage."""

    stage: str
    data: str
    epoch_tokens: int  # of the table
    epoch_steps: float
    steps: int
    tokens: int  # of all steps, padding left out
    time_s: float | None  # without evaluations; null where nothing is known
    time_is: Literal["as the earlier run", "at least", "unknown"]


def stage_estimates(
    program: Program, first: AbstractState, facts: DataFacts
) -> list[StageEstimate]:
    """Estimates of the training stages of a program; first: the state before the first stage."""
    rates = dict(_measured_rates(Path(program.out) / program.name / "metrics.jsonl"))
    flops = _flops_per_token(program, first)
    device, dtype = device_and_dtype(program.model)
    flops_per_second = _product_rate(device, dtype) if flops else 0.0
    found = []
    for stage in program.stage:
        if not isinstance(stage, Train):
            continue
        table = facts.tables[stage.data]
        steps = n_steps(stage, stage.epochs, table.n_rows)
        tokens = round(table.n_tokens * steps * stage.batch_size / table.n_rows)
        time_s, how = None, "unknown"
        if stage.label in rates:
            time_s, how = tokens / rates[stage.label], "as the earlier run"
        elif stage.label in flops:
            time_s, how = tokens * flops[stage.label] / flops_per_second, "at least"
        epoch_steps = table.n_rows / stage.batch_size
        found.append(
            StageEstimate(
                stage.label, stage.data, table.n_tokens, epoch_steps, steps, tokens, time_s, how
            )
        )
    return found


def _measured_rates(path: Path) -> Iterator[tuple[str, float]]:
    """(stage, median tokens a second) of the steps that an earlier run has logged."""
    rates: dict[str, list[float]] = {}
    for stage, _, line in read_rows(path):
        rate = json.loads(line).get("tokens_per_second")
        if isinstance(rate, int | float) and rate > 0:
            rates.setdefault(stage, []).append(float(rate))
    for stage, values in rates.items():
        yield stage, median(values)


def _flops_per_token(program: Program, first: AbstractState) -> Mapping[str, float]:
    """Floating-point operations a token by stage."""
    return {one.stage.label: one.flops_per_token for one in planned(program, first)}


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest of a few matrix products."""
    a = torch.ones(WIDTH, WIDTH, device=device, dtype=dtype)
    times = []
    for _ in range(N_PRODUCTS):
        start = perf_counter()
        (a @ a)[0, 0].item()  # which waits for an accelerator
        times.append(perf_counter() - start)
    return 2 * WIDTH**3 / min(times)
