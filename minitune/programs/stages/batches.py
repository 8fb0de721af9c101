"""What a training stage is fed: batches of whatever kind its loss needs, from one cursor."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from minitune import tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import apply_trainable
from minitune.algorithms.precompute import reference_logps, taught, teacher_tops
from minitune.data import preference, supervised
from minitune.data.cursor import Cursor
from minitune.data.supervised import prepare
from minitune.data.token_store import Report
from minitune.io import paths
from minitune.losses.registry import Loss
from minitune.programs.state import PipelineState
from minitune.tree import Tree


class BatchLoader(NamedTuple):
    """take(cursor, n) -> (batch of n rows, next cursor); batches(n): one pass in the order of the file."""

    told: str
    take: Callable[[Cursor, int], tuple[Tree, Cursor]]
    batches: Callable[[int], Iterator[Tree]]

    def n_tokens(self, batch: Tree) -> int:
        """Tokens in a batch, padding left out."""
        return sum(int((leaf > 0).sum()) for path, leaf in tree.items(batch) if path.endswith("segment_ids"))


def feed(world: PipelineState, name: str, loss: Loss, *, cached: bool, teacher: Teacher | None, top_k: int | None) -> BatchLoader:
    """The [data] table `name` as `loss` wants it: rows, pairs or unpaired answers, and with what a frozen model said of them
    where that is kept on disk."""
    source, loaded = world.data[name], world.loaded
    if loss.compares_answers:
        found = preference.prepare(source, loaded.tokenizer, loaded.template, paths.cache())
        said = None
        if cached and loss.needs_reference:
            adapted = apply_trainable(loaded.params, loaded.trainable, loaded.lora)
            said = reference_logps(loaded.model, adapted, found, source, paths.cache(), world.log.progress)
        return BatchLoader(
            describe(found.report),
            lambda cursor, n: preference.take(found, cursor, n, source, world.seed, said),
            lambda n: preference.batches(found, source, n, said),
        )
    rows = prepare(source, loaded.tokenizer, loaded.template, paths.cache())
    told = describe(rows.report) + (f", rows {rows.fill(source, world.seed):.1%} full" if source.packed else "")
    if teacher is None or top_k is None:
        return BatchLoader(
            told,
            lambda cursor, n: supervised.take(rows, cursor, n, source, world.seed),
            lambda n: supervised.batches(rows, source, n),
        )
    tops = teacher_tops(teacher, rows, top_k, loss.temperature, paths.cache(), world.log.progress)
    places = rows._replace(tokens=np.arange(len(rows.tokens)))  # a batch of these says where in the data each token stands

    def take(cursor: Cursor, n: int) -> tuple[Tree, Cursor]:
        batch, after = supervised.take(rows, cursor, n, source, world.seed)
        return taught(batch, supervised.take(places, cursor, n, source, world.seed)[0].tokens, tops), after

    def batches(n: int) -> Iterator[Tree]:
        both = zip(supervised.batches(rows, source, n), supervised.batches(places, source, n), strict=True)
        return (taught(batch, at.tokens, tops) for batch, at in both)

    return BatchLoader(told, take, batches)


def describe(report: Report) -> str:
    """A data report in words."""
    odd = {"truncated": report.n_truncated, "dropped": report.n_dropped, "without a target": report.n_without_target}
    odd |= {"with equal answers": report.n_identical}
    told = "".join(f", {n:,} {what}" for what, n in odd.items() if n)
    return f"{report.n_samples:,} samples, {report.n_tokens:,} tokens, {report.n_target_tokens:,} of them targets{told}"
