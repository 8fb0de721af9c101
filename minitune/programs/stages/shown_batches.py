"""Passes over data that a person sees: how many tokens are behind."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from minitune import tree
from minitune.programs.log import Log
from minitune.tree import Tree


def n_tokens(batch: Tree) -> int:
    """Tokens in a batch, padding left out."""
    segments = (leaf for path, leaf in tree.items(batch) if path.endswith("segment_ids"))
    return sum(int((leaf > 0).sum()) for leaf in segments)


@contextmanager
def shown_batches(
    log: Log,
    title: str,
    batches: Iterable[Tree],
    total: int,
) -> Iterator[Iterator[Tree]]:
    """Batches whose tokens are counted on the screen while they are taken; total: tokens of all."""
    with log.progress(title, total, brief=True) as progress:

        def counted() -> Iterator[Tree]:
            done = 0
            for batch in batches:
                yield batch
                done += n_tokens(batch)
                progress.update(min(done, total), {})

        yield counted()
