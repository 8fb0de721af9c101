"""Time of a step measured on a few of its layers, and the rates of the machine that it runs on."""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from minitune import hardware, host, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.registry import Frozen, objective_of
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.models.model import Model
from minitune.nn.dropout import seeded
from minitune.optim.apply import apply_gradients
from minitune.planning.alike import layer_number
from minitune.planning.devices import Device
from minitune.planning.flops import flops_per_token
from minitune.planning.step_spec import StepSpec
from minitune.tree import Tree
from minitune.types import Batch, Pairs, UnpairedBatch

Clock = Callable[[], float]
FEW, MORE = 1, 3  # layers of the two models that are timed
N_RUNS = 3  # of each, after one that is not counted
LONGEST_S = 1.5  # about, of one run: fewer rows are taken where all would take longer
WIDTH, COPIED_BYTES = 1024, 2**27  # of the matrices that are multiplied, of what is copied
READ_BYTES = 2**23  # of a file at a time


class Rows(NamedTuple):
    """Rows as the data has them."""

    target_share: float = 1.0  # of the tokens
    n_documents: int = 1  # of a row
    # documents by length: bar i counts those of more than i and at most i + 1 widths
    histogram: Sequence[int] = (1,)


def machine(
    device: torch.device, dtype: torch.dtype, clock: Clock = perf_counter, file: Path | None = None
) -> Device:
    """Figures of the machine that this runs on: the rate of one product and of one copy, and of
    reading a file where there is one.

    It stands alone, and no training has attained anything on it yet.
    """
    rates = {
        str(one).removeprefix("torch."): _product_rate(device, one, clock)
        for one in {torch.float32, dtype}
    }
    x = torch.ones(COPIED_BYTES // 4, device=device)
    y = torch.empty_like(x)
    copied_s = _median_s(lambda: tree.donate(y, x), device, clock)
    on_accelerator = hardware.is_accelerator(device)
    memory = hardware.total_bytes(device) if on_accelerator else host.total_bytes()
    bandwidth = 2 * COPIED_BYTES / copied_s
    from_host = None
    if hardware.capabilities(device).streams:
        there = hardware.pinned(torch.ones(COPIED_BYTES // 4))
        from_host = COPIED_BYTES / _median_s(lambda: there.to(device), device, clock)
    return Device(
        kind=device.type,  # pyright: ignore[reportArgumentType]
        memory_bytes=memory,
        memory_bytes_per_s=bandwidth,
        flops_per_s=rates,
        link_bytes_per_s=bandwidth,
        node_bytes_per_s=bandwidth,
        n_per_node=1,
        attained=1.0,
        host_bytes_per_s=from_host,
        disk_bytes_per_s=None if file is None else read_rate(file, clock),
    )


def read_rate(file: Path, clock: Clock = perf_counter) -> float:
    """Bytes a second of reading the first part of a file, of which the system keeps nothing in
    memory where it lets one say so.
    """
    n_bytes, started = 0, 0.0
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = clock()
        while n_bytes < COPIED_BYTES and (piece := opened.read(READ_BYTES)):
            n_bytes += len(piece)
    return n_bytes / (clock() - started)


def measured_step_s(
    step: StepSpec, rows: Rows, device: Device, clock: Clock = perf_counter
) -> float:
    """Seconds of a step on this machine, from those of models of one and of three of its layers.

    Every layer more takes as long as the last two did, on average. The objective, its rows and the
    update are those of the step, on random tokens.
    """
    n_layers = step.model.config.n_layers
    few, more = min(FEW, n_layers), min(MORE, n_layers)
    n_rows = _rows_at_once(step, more, device)
    times = [_micro_batch_and_update_s(step, n, n_rows, rows, clock) for n in {few, more}]
    of_few, of_more = times[0], times[-1]
    more_layers = n_layers - more
    micro_batch_s, update_s = (
        b + (b - a) / max(1, more - few) * more_layers for a, b in zip(of_few, of_more, strict=True)
    )
    return step.n_micro_batches * micro_batch_s * step.n_rows / n_rows + update_s


def _rows_at_once(step: StepSpec, n_layers: int, device: Device) -> int:
    """Rows of a micro-batch that take about LONGEST_S through a few layers."""
    share = n_layers / step.model.config.n_layers
    per_row = flops_per_token(step.model, step.trainable, step.n_tokens) * step.n_tokens * share
    least = step.loss.rows_per_sample
    n = int(LONGEST_S * device.flops_per_s["float32"] / per_row) // least * least
    return min(step.n_rows, max(least * getattr(step.loss, "min_samples", 1), n))


def _micro_batch_and_update_s(
    step: StepSpec, n_layers: int, n_rows: int, rows: Rows, clock: Clock
) -> tuple[float, float]:
    """(seconds of the gradients of a micro-batch, of the update) with the first layers alone."""
    model, device = _shallow(step.model, n_layers), step.device
    params, trainable = (
        _random(_first_layers(leaves, n_layers), device) for leaves in (step.params, step.trainable)
    )
    teacher = None
    if step.teacher is not None:
        theirs = min(n_layers, step.teacher.model.config.n_layers)
        weights = _random(_first_layers(step.teacher.params, theirs), device)
        teacher = Teacher(_shallow(step.teacher.model, theirs), weights)
    objective = objective_of(model, step.lora, step.loss, Frozen(trainable, teacher))
    # every run has rows of its own, as every step of a training has: new lengths of documents are
    # new shapes of products
    batches: list[Any] = [_batch(step, n_rows, rows, seed) for seed in range(1 + N_RUNS)]
    if step.lora is not None and step.lora.dropout:
        batches = [seeded(batch, 0, 0) for batch in batches]
    next_batch = cycle(batches).__next__
    gradients = value_and_grad(objective, has_aux=True)
    found: list[Tree] = []

    def micro_batch() -> None:
        found[:] = [gradients(trainable, params, next_batch())[1]]

    micro_batch_s = _median_s(micro_batch, device, clock)
    state = step.optimizer.init(trainable)
    one = torch.ones((), device=device)
    how = {"divisor": one, "norm": one, "is_finite": one > 0, "donate": True}
    update_s = _median_s(
        lambda: apply_gradients(step.optimizer, found[0], state, trainable, **how), device, clock
    )
    return micro_batch_s, update_s


def _shallow(model: Model, n_layers: int) -> Model:
    config = msgspec.structs.replace(model.config, n_layers=n_layers)
    return model._replace(config=config, n_remat=min(model.n_remat, n_layers))


def _first_layers(leaves: Mapping[str, Any], n: int) -> dict[str, Any]:
    return {
        name: leaf
        for name, leaf in leaves.items()
        if (layer := layer_number(name)) is None or layer < n
    }


def _random(leaves: Tree, device: torch.device) -> Tree:
    """Small random numbers of the shapes and dtypes of these, codes among them."""
    generator = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype, device=device)
        return (0.02 * torch.randn(x.shape, generator=generator)).to(device, x.dtype)

    return tree.map(like, leaves)


def _batch(step: StepSpec, n_rows: int, rows: Rows, seed: int) -> Batch | Pairs | UnpairedBatch:
    """Rows of the kind that the loss takes, n_rows of tokens in all."""
    n = n_rows // step.loss.rows_per_sample
    generator = torch.Generator().manual_seed(seed)
    shape = (n, step.n_tokens)
    tokens = torch.randint(0, step.model.config.vocab_size, shape, generator=generator)
    segments = _segments(shape, rows, generator)
    batch = Batch(tokens, segments, torch.rand(shape, generator=generator) < rows.target_share)
    if not step.loss.compares_answers:
        return batch
    if step.loss.objective == "preference":
        return Pairs(batch, batch)
    return UnpairedBatch(batch, batch, torch.arange(n) % 2 == 0)


def _segments(shape: tuple[int, int], rows: Rows, generator: torch.Generator) -> Tensor:
    """Segments of rows that are full: each has documents whose lengths are drawn from the
    histogram, and then stretched to fill it.
    """
    n_rows, n_tokens = shape
    weights = torch.tensor(rows.histogram, dtype=torch.float32)
    n = n_rows * rows.n_documents
    bars = torch.multinomial(weights, n, replacement=True, generator=generator)
    lengths = (bars + torch.rand(n, generator=generator)).view(n_rows, rows.n_documents)
    ends = lengths.cumsum(1) / lengths.sum(1, keepdim=True) * n_tokens
    places = torch.arange(n_tokens, dtype=torch.float32).expand(shape).contiguous()
    segments = torch.searchsorted(ends[:, :-1].contiguous(), places, right=True)
    return (segments + 1).to(torch.int32)


def _product_rate(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    a = torch.ones(WIDTH, WIDTH, device=device, dtype=dtype)
    return 2 * WIDTH**3 / _median_s(lambda: a @ a, device, clock)


def _median_s(run: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    """Median time of a few runs after one that is not counted."""
    times = []
    for _ in range(1 + N_RUNS):
        started = clock()
        run()
        if hardware.is_accelerator(device):
            torch.accelerator.synchronize()
        times.append(clock() - started)
    return median(times[1:])
