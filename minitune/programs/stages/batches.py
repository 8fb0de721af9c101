"""Batches of a training stage: of whatever kind its loss needs, taken from a cursor."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, cast

import numpy as np
import torch

from minitune import tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import apply_trainable
from minitune.algorithms.precompute import TopK, reference_logps, teacher_tops, with_teacher
from minitune.autodiff.value_and_grad import accumulate
from minitune.data import preference, supervised
from minitune.data.cursor import Cursor
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.data.supervised import Dataset
from minitune.data.token_store import OnSample, Report, no_one
from minitune.io import paths
from minitune.losses.registry import DistillationLoss, Loss
from minitune.programs.signals import Stopped
from minitune.programs.state import AbstractState, PipelineState
from minitune.sharding.ranks import counted
from minitune.text.template import Template
from minitune.text.tokenizer import Tokenizer
from minitune.tree import Tree, device_of
from minitune.types import Batch, Mean

CALIBRATION_ROWS = 8  # a forward

FEW = 10  # held-out samples, below which their mean loss says little


class BatchLoader(NamedTuple):
    """Batches of one [data] table.

    take(cursor, n) -> (batch of n rows, next cursor); batches(n): one pass in the order of the
    file.
    """

    description: str  # of the data, for the log
    take: Callable[[Cursor, int], tuple[Tree, Cursor]]
    batches: Callable[[int], Iterator[Tree]]
    total_tokens: int  # of one pass


def load_batches(
    state: PipelineState,
    name: str,
    loss: Loss,
    *,
    cached: bool = False,
    teacher: Teacher | None = None,
    top_k: int | None = None,
) -> BatchLoader:
    """Loader of the [data] table `name` in the form that the loss needs: rows, pairs, or unpaired
    answers.

    cached: pairs carry the log-probs of a reference, computed once and kept on disk; top_k: rows
    carry that many of the teacher's likeliest tokens, kept on disk as well.
    """
    if loss.compares_answers:
        return _load_answers(state, name, cached and loss.needs_reference)
    source, loaded = state.data[name], state.loaded
    dataset = supervised.prepare(source, loaded.tokenizer, loaded.template, paths.cache())
    fill = f", rows {dataset.fill(source, state.seed):.1%} full" if source.packed else ""
    description = describe(dataset.report, name, source) + fill
    if teacher is not None and top_k is not None:
        temperature = cast(DistillationLoss, loss).temperature  # no other loss has a teacher
        progress = state.log.progress
        with state.ranks.first_on_node():
            tops = teacher_tops(teacher, dataset, top_k, temperature, paths.cache(), progress)
        return _with_teacher_rows(state, source, dataset, description, tops)
    return BatchLoader(
        description,
        lambda cursor, n: supervised.take(dataset, cursor, n, source, state.seed),
        lambda n: supervised.batches(dataset, source, n),
        dataset.report.n_tokens,
    )


def _load_answers(state: PipelineState, name: str, cached: bool) -> BatchLoader:
    loaded, source = state.loaded, state.data[name]
    answers = preference.prepare(source, loaded.tokenizer, loaded.template, paths.cache())
    logps = None
    if cached:
        adapted = apply_trainable(loaded.params, loaded.trainable, loaded.lora)
        progress = state.log.progress
        with state.ranks.first_on_node():
            logps = reference_logps(loaded.model, adapted, answers, source, paths.cache(), progress)
    return BatchLoader(
        describe(answers.report, name, source),
        lambda cursor, n: preference.take(answers, cursor, n, source, state.seed, logps),
        lambda n: preference.batches(answers, source, n, logps),
        answers.report.n_tokens,
    )


def _with_teacher_rows(
    state: PipelineState, source: Source, dataset: Dataset, description: str, tops: TopK
) -> BatchLoader:
    # A batch of these says where in the data set each token stands, which is where the teacher's
    # tokens lie.
    positions = dataset._replace(tokens=np.arange(len(dataset.tokens)))

    def take(cursor: Cursor, n: int) -> tuple[Tree, Cursor]:
        batch, after = supervised.take(dataset, cursor, n, source, state.seed)
        at, _ = supervised.take(positions, cursor, n, source, state.seed)
        return with_teacher(batch, at.tokens, tops), after

    def batches(n: int) -> Iterator[Tree]:
        rows, places = (
            supervised.batches(dataset, source, n),
            supervised.batches(positions, source, n),
        )
        for batch, at in zip(rows, places, strict=True):
            yield with_teacher(batch, at.tokens, tops)

    return BatchLoader(description, take, batches, dataset.report.n_tokens)


def calibration_batches(state: PipelineState, label: str, name: str, n_rows: int) -> list[Batch]:
    """First rows of a [data] table, on the device of the model, in the order of the file."""
    source, loaded = state.data[name], state.loaded
    dataset = supervised.prepare(source, loaded.tokenizer, loaded.template, paths.cache())
    state.log.say(f"{label}: calibrating on {n_rows} rows of {name}")
    rows = supervised.batches(dataset, source, CALIBRATION_ROWS)
    device = device_of(loaded.params, loaded.trainable)
    some = islice(rows, -(-n_rows // CALIBRATION_ROWS))
    return [tree.map(lambda x: x.to(device), batch) for batch in some]


class TokenizedTable(NamedTuple):
    """Tokenized [data] table, as far as a stage asks before it loads anything."""

    description: str
    n_rows: int  # (or pairs) of the first epoch
    longest: int  # tokens of the longest document
    n_tokens: int


def tokenized(abstract: AbstractState, name: str, seed: int = 0) -> TokenizedTable:
    """Tokenize a [data] table into the cache; InputError for a row that can't be."""
    text = abstract.text()
    return tokenized_table(name, abstract.data[name], *text, seed, abstract.on_sample(name))


def tokenized_table(
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    seed: int,
    on_sample: OnSample = no_one,
) -> TokenizedTable:
    """Tokenize a [data] table as a model reads it; InputError for a row that can't be."""
    if source.format in PREFERENCE_FORMATS:
        answers = preference.prepare(source, tokenizer, template, paths.cache(), on_sample)
        report, order, offsets = answers.report, answers.order, answers.answers.offsets
    else:
        dataset = supervised.prepare(source, tokenizer, template, paths.cache(), on_sample)
        report, order, offsets = dataset.report, dataset.order, dataset.offsets
    description = f"{name} has {describe(report, name, source)}"
    longest = int(np.diff(offsets).max())
    return TokenizedTable(description, len(order(seed, 0)), longest, report.n_tokens)


def heldout_losses(
    mean_loss: Callable[[Tree], Mean],
    batches: Iterable[Tree],
    state: PipelineState,
) -> list[float]:
    """Mean losses over all batches, one for each model that mean_loss(batch) has a mean of; the
    ranks share out the batches.

    Stopped after a signal to any of several ranks, at the same batch on each.
    """
    with torch.no_grad():
        dealt = state.ranks.deal(_until_stopped(batches, state))
        mean = state.ranks.sum(accumulate(counted(mean_loss), dealt))
    return mean.value().reshape(-1).tolist()


def _until_stopped(batches: Iterable[Tree], state: PipelineState) -> Iterator[Tree]:
    """Batches, before each of which several ranks agree to go on."""
    for batch in batches:
        if state.ranks.size > 1 and state.is_stopping():
            raise Stopped(0, state.folder)  # the training loop knows the step
        yield batch


def left_out(report: Report, table: str, source: Source) -> dict[str, int]:
    """Counts of the samples that are not as the files have them, by words for the reason, with the
    keys that decide on it."""
    longer = f"longer than data.{table}.seq_len = {source.max_seq_len}"
    before = f"cut at seq_len = {source.max_seq_len} before the first answer"
    cut_off = f"{before}; raise data.{table}.seq_len"
    counts = {
        f"truncated ({longer})": report.n_truncated,
        f'dropped ({longer}; overlong = "truncate" keeps their beginning)': report.n_dropped,
        f"left out: {cut_off}": report.n_cut_off,
        "without a target": report.n_without_target,
        "with equal answers": report.n_identical,
        "texts split": report.n_split,
        "malformed rows skipped": report.n_malformed,
        "rows refused and skipped": report.n_refused,
    }
    for key, n in report.unwritten.items():
        counts[f"without their {key}, which the template does not write"] = n
    return {reason: n for reason, n in counts.items() if n}


def describe(report: Report, table: str, source: Source) -> str:
    """Report of a data table in words, with the keys that decide on what was left out."""
    notes = [f", {n:,} {reason}" for reason, n in left_out(report, table, source).items()]
    if report.first_refused:
        notes.append(f"; the first row skipped is {report.first_refused}")
    if source.split is not None and source.split.part == "heldout" and report.n_samples < FEW:
        notes.append(f"; a loss over fewer than {FEW} samples says little: raise holdout")
    return (
        f"{report.n_samples:,} samples, {report.n_tokens:,} tokens, {report.n_target_tokens:,} of "
        f"them targets{''.join(notes)}"
    )
