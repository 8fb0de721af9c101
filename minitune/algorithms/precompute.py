"""Outputs of a frozen model over a data set, computed once and kept under a hash of the data and of
the model's every byte.

A reference's log-probs of answers (for preference losses) and a teacher's likeliest tokens (for
distillation).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minitune import tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import answer_logps
from minitune.checkpoint.fingerprint import fingerprint
from minitune.data import preference
from minitune.data.preference import PairSet
from minitune.data.source import Source
from minitune.data.supervised import Dataset
from minitune.data.token_store import Documents, padded
from minitune.errors import InputError
from minitune.io import array_cache
from minitune.models.model import Model
from minitune.nn.head import head_chunk
from minitune.types import Batch, Params, TeacherBatch, widen

LAYOUT = 1  # of both caches: another number makes every cache anew
FORWARD_TOKENS = 2**13  # tokens in a forward, padding included
# (title, total) -> a value with update(done, readings)
StartProgress = Callable[[str, int], AbstractContextManager[Any]]


class TopK(NamedTuple):
    """Row t of both: the k likeliest tokens in the place of token t of a data set, likeliest first,
    and their log-probs.
    """

    ids: np.ndarray
    logps: np.ndarray


def reference_logps(
    model: Model,
    params: Params,
    pairset: PairSet,
    source: Source,
    cache: Path,
    progress: StartProgress | None = None,
) -> np.ndarray:
    """Summed log-probs [n, 2] in nats, float32: of chosen and rejected, or of unpaired answers and
    mismatched ones.

    InputError for a damaged cache.
    """
    n = pairset.report.n_samples
    folder = cache / array_cache.key(LAYOUT, "reference", pairset.key, *_model_key(model, params))
    if not array_cache.is_whole(folder):
        shown = _shown(progress, "reference log-probs", n)
        filling = array_cache.filling(folder, 8 * n)
        with filling as aside, shown as show, torch.no_grad():
            np.save(aside / "logps.npy", _answer_logps(model, params, pairset, source, show))
    with array_cache.intact(folder, f"log-probs of {n} samples"):
        (logps,) = array_cache.load(folder, "logps")
        if logps.shape != (n, 2):
            raise ValueError(f"an array of {list(logps.shape)}")
    return logps


def teacher_tops(
    teacher: Teacher,
    dataset: Dataset,
    k: int,
    temperature: float,
    cache: Path,
    progress: StartProgress | None = None,
) -> TopK:
    """Teacher's k likeliest tokens in the place of every target, by log_softmax(logits /
    temperature); int32 and float32.

    Zero where there is no target. Logits of head.head_chunk targets exist at a time. InputError for
    a k that the vocabulary does not have, and for a damaged cache.
    """
    n_tokens, vocab_size = len(dataset.tokens), teacher.model.head(teacher.params).shape[0]
    if not 0 < k <= vocab_size:
        raise InputError(
            f"precompute: top_k = {k}, expected 1 to {vocab_size}, the teacher's vocabulary; "
            "change it"
        )
    folder = cache / array_cache.key(
        LAYOUT, "tops", dataset.key, k, temperature, *_model_key(*teacher)
    )
    if not array_cache.is_whole(folder):
        shown = _shown(progress, "teacher", len(dataset.offsets) - 1)
        filling = array_cache.filling(folder, 8 * n_tokens * k)
        with filling as aside, shown as show, torch.no_grad():
            ids = array_cache.zeros(aside / "ids.npy", np.int32, (n_tokens, k))
            logps = array_cache.zeros(aside / "logps.npy", np.float32, (n_tokens, k))
            for places, top_ids, top_logps in _top_rows(teacher, dataset, k, temperature, show):
                ids[places], logps[places] = top_ids, top_logps
            ids.flush()
            logps.flush()
    with array_cache.intact(folder, f"the {k} likeliest of {n_tokens} tokens"):
        tops = TopK(*array_cache.load(folder, *TopK._fields))
        if not tops.ids.shape == tops.logps.shape == (n_tokens, k):
            raise ValueError(f"arrays of {list(tops.ids.shape)} and {list(tops.logps.shape)}")
    return tops


def with_teacher(batch: Batch, positions: Int[Tensor, "B T"], tops: TopK) -> TeacherBatch:
    """Batch with what the teacher says of every token, given where each one stands in the data."""
    at = positions.numpy()
    return TeacherBatch(
        batch,
        torch.from_numpy(tops.ids[at].astype(np.int64)),
        torch.from_numpy(np.array(tops.logps[at])),
    )


def _answer_logps(
    model: Model, params: Params, pairset: PairSet, source: Source, show: Callable[[int], None]
) -> np.ndarray:
    n, place = pairset.report.n_samples, _place(params)
    logps, done = np.zeros((n, 2), dtype=np.float32), 0
    for rows in _batched(np.diff(pairset.answers.offsets).reshape(n, -1).max(1)):
        both = tree.map(lambda x: x.to(place), tuple(preference.select(pairset, rows, source))[:2])
        logps[rows] = np.stack([_numpy(answer_logps(model, params, one)) for one in both], axis=1)
        done += len(rows)
        show(done)
    return logps


def _top_rows(
    teacher: Teacher, dataset: Dataset, k: int, temperature: float, show: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(places in the data set [n], ids [n k], log-probs [n k]) of all targets, chunk by chunk."""
    model, params = teacher
    chunk, place, done = head_chunk(model.head(params)), _place(params), 0
    documents = Documents(dataset.tokens, dataset.mask, dataset.offsets)
    numbered = documents._replace(tokens=np.arange(len(dataset.tokens)))
    for rows in _batched(np.diff(dataset.offsets)):
        batch = padded([[documents.at(i)] for i in rows])
        places = _numpy(padded([[numbered.at(i)] for i in rows]).tokens[batch.target_mask() > 0])
        batch = tree.map(lambda x: x.to(place), batch)
        # the state before a token predicts it
        states = model.hidden(params, batch).roll(1, 1)[batch.target_mask() > 0]
        for start in range(0, len(places), chunk):
            logits = model.logits(params, states[start : start + chunk])
            wide = widen(logits)
            top = (wide / temperature).log_softmax(-1).topk(k)
            yield places[start : start + chunk], _numpy(top.indices), _numpy(top.values)
        done += len(rows)
        show(done)


def _model_key(model: Model, params: Params) -> tuple[str, Any, str]:
    return model.family.name, msgspec.to_builtins(model.config), fingerprint(params)


def _batched(lengths: np.ndarray) -> Iterator[list[int]]:
    """Numbers of all samples, longest first, as many together as fit in FORWARD_TOKENS when padded
    to the longest.
    """
    order, start = np.argsort(-lengths, kind="stable").tolist(), 0
    while start < len(order):
        rows = order[start : start + max(1, FORWARD_TOKENS // int(lengths[order[start]]))]
        start += len(rows)
        yield rows


@contextmanager
def _shown(
    progress: StartProgress | None, title: str, total: int
) -> Iterator[Callable[[int], None]]:
    if progress is None:
        yield lambda done: None
    else:
        with progress(title, total) as bar:
            yield lambda done: bar.update(done, {})


def _place(params: Params) -> torch.device:
    return next(leaf.device for leaf in tree.leaves(params) if not leaf.is_meta)


def _numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()
