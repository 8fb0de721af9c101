"""Time of the stages of a plan: at best and as expected, in words, and the measured machine."""

import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import msgspec
import torch

from minitune import hardware
from minitune.io import atomic, paths
from minitune.io.toml_writing import dumps
from minitune.planning.calibration import Clock, Rows, machine, measured_step_s
from minitune.planning.devices import Device, read_device
from minitune.planning.timing import Timing, timing
from minitune.programs.data_facts import TableFacts
from minitune.programs.plan import Planned
from minitune.programs.plan_rows import step_tokens
from minitune.programs.stages.expected_time import duration, evaluations_left, forward_share
from minitune.programs.stages.train import Train

GIB = 2**30
BINDS = {
    "products": "matrix products bind",
    "memory": "memory binds",
    "links": "links bind",
    "copies": "copies of frozen blocks bind",
}


class PlannedTime(NamedTuple):
    """Time of a training stage on a device."""

    step: Timing
    device: Device
    tokens: int  # of a step, on all ranks
    n_steps: int
    n_evaluations: int = 0
    evaluation_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second at best."""
        return self.tokens / self.step.roof_s

    @property
    def end_s(self) -> float:
        """Time of all steps and evaluations."""
        return self.n_steps * self.step.expected_s + self.n_evaluations * self.evaluation_s

    def lines(self, label: str) -> Iterator[str]:
        """Lines on it: a step, what is sent, the whole stage."""
        step = self.step
        yield (
            f"{label}: at best {step.roof_s:.3g} s a step and {self.tokens_per_s:,.0f} tokens/s, "
            f"where {BINDS[step.binds]}; expected {step.expected_s:.3g} s and "
            f"{self.tokens / step.expected_s:,.0f} tokens/s, {self.device.attained:.0%} of the "
            "rate of products"
        )
        if any(step.sent):
            yield f"  each rank sends {_sent(step)}"
        if step.fetched:
            yield f"  {_fetched(step)}"
        evaluations = ""
        if self.n_evaluations:
            evaluations = f" and {self.n_evaluations:,} evaluations of {self.evaluation_s:.3g} s"
        yield (
            f"  {self.n_steps:,} steps{evaluations} take {duration(self.end_s)}, what comes before "
            "the first step left out"
        )


class Reading(NamedTuple):
    """Weights that a program reads before its first step."""

    n_bytes: int  # of their files
    disk_bytes_per_s: float | None  # as the device has it; None: not known

    @property
    def seconds(self) -> float | None:
        """Time of reading them; None where it is not known."""
        return None if self.disk_bytes_per_s is None else self.n_bytes / self.disk_bytes_per_s

    @property
    def line(self) -> str:
        """Line on it, which names what is left out."""
        duration_words = "in how long is not known: plan --measure finds out"
        if self.seconds is not None:
            duration_words = f"in {self.seconds:.3g} s at the rate of the disk"
        return (
            f"before the first step {self.n_bytes / GIB:,.3g} GiB of weights are read, "
            f"{duration_words}; tokenizing, quantizing and compiling are not counted"
        )


def planned_time(one: Planned, device: Device, heldout_tokens: int = 0) -> PlannedTime:
    """Time of a training stage on a device; heldout_tokens: of the table that it evaluates on.

    An evaluation takes the part of a step that is its forward, for each of these tokens.
    """
    assert isinstance(one.stage, Train), "there is no step to time"
    step, stage = one.step, one.stage
    tokens = step_tokens(one)
    found = timing(step, one.flops_per_token, one.parts, device)
    planned = PlannedTime(found, device, tokens, stage.steps)
    if stage.evaluate is None or not heldout_tokens:
        return planned
    n_evaluations = stage.evaluate.at_start + evaluations_left(stage, 0)
    of_step = forward_share(step.trainable) * found.expected_s
    return planned._replace(
        n_evaluations=n_evaluations, evaluation_s=of_step * heldout_tokens / tokens
    )


def measured(
    one: Planned, facts: TableFacts, device: Device, clock: Clock = perf_counter
) -> Device:
    """Machine with what the step of a stage attains on it, measured on a few of its layers."""
    rows = Rows(
        facts.n_target_tokens / max(1, facts.n_tokens),
        max(1, round(facts.n_samples / max(1, facts.n_rows))),
        facts.lengths.counts,
    )
    step_s = measured_step_s(one.step, rows, device, clock)
    at_full_rate = timing(one.step, one.flops_per_token, one.parts, device).products_s
    return msgspec.structs.replace(device, attained=min(1.0, at_full_rate / step_s))


def measured_machine(
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock = perf_counter,
    file: Path | None = None,
) -> Device:
    """Figures of this machine, measured now; file: one whose reading is timed too."""
    return machine(device, hardware.product_dtype(dtype, device), clock, file)


def keep_machine(device: Device) -> Path:
    """Write the figures of this machine into the cache; returns the file."""
    file = _machine_file(device.kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "# This machine, as `minitune plan --measure` found it\n"
    figures = {key: x for key, x in msgspec.to_builtins(device).items() if x is not None}
    atomic.write_atomic(file, (text + dumps(figures)).encode())
    return file


def known_machine(kind: str) -> Device | None:
    """Figures of this machine that an earlier --measure has kept; None before one."""
    file = _machine_file(kind)
    return read_device(file) if file.is_file() else None


def _machine_file(kind: str) -> Path:
    """File of this machine, its threads and its torch in the cache."""
    facts = (platform.node(), platform.machine(), torch.get_num_threads(), torch.__version__)
    limits = (os.environ.get("ATEN_CPU_CAPABILITY"), os.environ.get("ONEDNN_MAX_CPU_ISA"))
    digest = hashlib.sha256(repr((facts, limits)).encode()).hexdigest()
    return paths.cache() / "machines" / f"{kind}-{digest[:16]}.toml"


def _fetched(step: Timing) -> str:
    """Words on the frozen blocks that come to the device in a step."""
    words = f"{step.fetched / GIB:,.3g} GiB of frozen blocks come to the device"
    if step.fetched_s is None:
        return f"{words}, in how long is not known: plan --measure finds out"
    hidden = "behind the products" if step.hides_fetched else "longer than the products"
    return f"{words} in {step.fetched_s:.3g} s, {hidden}"


def _sent(step: Timing) -> str:
    """Words on what a rank sends in a step, and whether that hides behind the products."""
    sent = step.sent
    words = []
    if sent.gathered or sent.scattered:
        hidden = "behind the products" if step.hides_overlapped else "longer than the products"
        words.append(
            f"{sent.gathered / GIB:,.3g} GiB of weights and {sent.scattered / GIB:,.3g} GiB of "
            f"gradients in {step.overlapped_s:.3g} s, {hidden}"
        )
    if sent.exchanged:
        words.append(
            f"{sent.exchanged / GIB:,.3g} GiB of activations in {step.exchanged_s:.3g} s, "
            "for which the products wait"
        )
    if sent.summed:
        words.append(
            f"{sent.summed / GIB:,.3g} GiB of gradients between copies in {step.exposed_s:.3g} s, "
            "after the products"
        )
    return "; ".join(words)
