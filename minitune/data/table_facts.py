"""Facts on tokenized tables that a person checks before training: how long samples are, which of
them come twice, and which of one table stand in another.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from minitune.data.token_store import Documents

MOST_BARS = 12  # of a histogram
MOST_COMPARED = 1_000_000  # samples of a table; comparing more takes longer than a look may


class Lengths(msgspec.Struct, frozen=True):
    """Histogram of the tokens of documents.

    Bar i counts the documents of more than i * width and at most (i + 1) * width tokens.
    """

    width: int
    counts: list[int]
    mean: float
    median: float
    longest: int


class Overlap(msgspec.Struct, frozen=True):
    """Samples of a measured table that a trained one holds too, token by token.

    A prompt is what stands before the first trained token: with an equal prompt, a sample asks what
    was trained, though its answer may be another.
    """

    trained: str
    measured: str
    n_samples: int  # of the measured table
    n_equal: int
    n_equal_prompts: int


class Samples(NamedTuple):
    """Tokenized samples of a table; each is as many documents as per_sample says, one after the
    other: two for a pair.
    """

    documents: Documents
    per_sample: int

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return (len(self.documents.offsets) - 1) // self.per_sample

    def hashes(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (hash of all tokens, hash of the prompt) of each sample."""
        for sample in range(self.n_samples):
            whole = hashlib.blake2b(digest_size=16)
            prompt = b""
            for i in range(sample * self.per_sample, (sample + 1) * self.per_sample):
                tokens, mask = self.documents.at(i)
                content = tokens.tobytes()
                # Two answers must not hash as one text that is cut elsewhere.
                whole.update(len(content).to_bytes(8, "little") + content)
                start = int(np.argmax(mask > 0))
                prompt = prompt or tokens[:start].tobytes()
            yield whole.digest(), hashlib.blake2b(prompt, digest_size=16).digest()


def lengths(documents: Documents) -> Lengths:
    """Histogram of how many tokens the documents have."""
    sizes = np.diff(documents.offsets)
    longest = int(sizes.max())
    width = _round_width(longest)
    counts = np.bincount((sizes - 1) // width, minlength=-(-longest // width))
    return Lengths(width, counts.tolist(), float(sizes.mean()), float(np.median(sizes)), longest)


def n_repeated(samples: Samples) -> int | None:
    """Number of samples that repeat an earlier one; None for a table too large to look."""
    if samples.n_samples > MOST_COMPARED:
        return None
    return samples.n_samples - len({whole for whole, _ in samples.hashes()})


def overlap(trained: tuple[str, Samples], measured: tuple[str, Samples]) -> Overlap | None:
    """Samples of the measured table that the trained one holds, each table with its name; None for
    tables too large to look.
    """
    (name, own), (other_name, others) = trained, measured
    if max(own.n_samples, others.n_samples) > MOST_COMPARED:
        return None
    wholes, prompts = map(set, zip(*own.hashes(), strict=True))
    n_equal = n_equal_prompts = 0
    for whole, prompt in others.hashes():
        n_equal += whole in wholes
        n_equal_prompts += prompt in prompts
    return Overlap(name, other_name, others.n_samples, n_equal, n_equal_prompts)


def _round_width(longest: int) -> int:
    """Width of a bar: the least of 1, 2, 5, 10, 20, 50 ... with at most MOST_BARS bars."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale * MOST_BARS >= longest:
                return step * scale
        scale *= 10
