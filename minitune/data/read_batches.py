"""From a data file to batches in one call, for programs of one's own."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from minitune.data import preference, supervised
from minitune.data.cursor import Cursor
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.io import paths
from minitune.text.chat import open_text
from minitune.types import Batch, Pairs, UnpairedBatch


def read_batches(
    source: Source,
    model: str,
    *,
    n_rows: int,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Batch | Pairs | UnpairedBatch]:
    """Batches of n_rows rows of a source, tokenized as the tokenizer and the chat template of a
    model's folder do it: each a Batch, Pairs or an UnpairedBatch, by the source's format.

    seed: of the order of endless epochs, for training; None for one pass in the order of the file,
    whose last batch may have fewer rows. model: a folder, or "demo". Rows are tokenized once and
    kept in the user's cache. With vocab_size, the number of embeddings that the model has, a text
    that needs others is refused.

    InputError for a file, a row or a folder that can't be read. `supervised.take` and
    `preference.take` give the same batches from a Cursor, a value to save and to resume from.
    """
    text = open_text(paths.locate(model), vocab_size)
    located = source.with_paths(lambda path: [paths.locate(path)])
    if located.format in PREFERENCE_FORMATS:
        answers = preference.prepare(located, *text, paths.cache())
        if seed is None:
            return preference.batches(answers, located, n_rows)
        return _endless(partial(preference.take, answers), located, n_rows, seed)
    dataset = supervised.prepare(located, *text, paths.cache())
    if seed is None:
        return supervised.batches(dataset, located, n_rows)
    return _endless(partial(supervised.take, dataset), located, n_rows, seed)


def _endless(
    take: Callable[..., tuple[Any, Cursor]], source: Source, n_rows: int, seed: int
) -> Iterator[Any]:
    cursor = Cursor(0, 0)
    while True:
        batch, cursor = take(cursor, n_rows, source, seed)
        yield batch
