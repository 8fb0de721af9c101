"""Advice on a run: what its figures warn of, and what to change."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from minitune.programs.page.run_files import RunFiles
from minitune.programs.records import rounding_warning

ENOUGH_ROWS = 20  # rows of a stage below which its course says nothing
SMALL_GAIN = 0.01  # share of the first losses by which training lowered them, at least
SPIKE = 10.0  # times the median gradient norm
OVERFITTED = 0.02  # share by which the last held-out loss lies above the best
CUT = "(cut)"


def advice(run: RunFiles) -> list[str]:
    """Sentences on what is wrong or odd in a run, each with what to do; none if nothing is."""
    found: list[str] = []
    for stage, rows in run.rows.items():
        for number in sorted({row["adapter"] for row in rows}, key=str):
            own = [row for row in rows if row["adapter"] == number]
            label = stage if number is None else f"{stage}, adapter {number}"
            texts = (*_of_losses(own), *_of_steps(own), *_of_heldout(own))
            found += [f"{label}: {text}" for text in texts]
    for stage, record in run.records.items():
        found += [f"{stage}: {text}" for text in _of_answers(record)]
        warning = rounding_warning(stage, record.get("merge_error"), record.get("onto"))
        found += [warning] if warning is not None else []
    return found


def _of_losses(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Advice where training hardly lowered the loss."""
    losses = _finite(rows, "loss")
    if len(losses) >= ENOUGH_ROWS:
        part = max(1, len(losses) // 10)
        first, last = fmean(losses[:part]), fmean(losses[-part:])
        if first - last < SMALL_GAIN * abs(first):
            yield (
                f"the loss went from {first:.4g} to {last:.4g}, so hardly anything was learned. "
                "Try a higher rate (optimizer.lr), more steps, and `show-sample` to see what is "
                "trained"
            )


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Advice on a gradient that was far larger than the others, and on skipped steps."""
    norms = _finite(rows, "grad_norm")
    if len(norms) >= ENOUGH_ROWS and max(norms) > SPIKE * median(norms) > 0:
        step = max(rows, key=lambda row: _value(row, "grad_norm", 0.0))["step"]
        yield (
            f"the gradient's norm was {max(norms):.3g} at step {step}, {SPIKE:.0f} times its "
            "median and more. Look at the rows of that step, lower optimizer.lr or clip_norm, or "
            "warm up longer"
        )
    n_skipped = sum(_value(row, "skipped", 0.0) > 0 for row in rows)
    if n_skipped:
        yield (
            f"{n_skipped} of {len(rows)} steps changed nothing, because a loss or gradient was "
            "not finite. Lower optimizer.lr, or set model.dtype to float32"
        )


def _of_heldout(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Advice where the held-out loss rose again."""
    heldout = _finite(rows, "heldout_loss")
    if len(heldout) >= 3 and heldout[-1] > (1 + OVERFITTED) * min(heldout):
        yield (
            f"the held-out loss rose from {min(heldout):.4g} to {heldout[-1]:.4g}, while training "
            'went on. Train fewer epochs; with evaluate.keep = "best" the best state goes on'
        )


def _of_answers(record: Mapping[str, Any]) -> Iterator[str]:
    samples = record.get("samples") or ()
    n_cut = sum(str(sample.get("answer", "")).endswith(CUT) for sample in samples)
    if n_cut:
        yield (
            f"{n_cut} of the {len(samples)} answers shown were cut at max_new_tokens. Raise it, "
            "or look whether the model has learned to end its answers"
        )
    dropped = record.get("n_dropped")
    if dropped:
        yield (
            f"{dropped} rows were left out of the evaluation, because they are longer than "
            "seq_len. Raise data.*.seq_len"
        )


def _finite(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def _value(row: Mapping[str, Any], name: str, absent: float) -> float:
    value = row.get(name, absent)
    return value if math.isfinite(value) else absent
