"""Facts on tokenized tables equal what is counted one by one in plain Python."""

import numpy as np
import pytest

from minitune.data import table_facts
from minitune.data.table_facts import Samples, lengths, n_repeated, overlap
from minitune.data.token_store import Documents


def documents(texts: list[list[int]], n_prompt: int = 2) -> Documents:
    masks = [[i >= n_prompt for i in range(len(text))] for text in texts]
    offsets = np.cumsum([0, *map(len, texts)])
    flat = [token for text in texts for token in text]
    return Documents(np.array(flat, dtype=np.int32), np.array([trained for mask in masks for trained in mask]), offsets)


@pytest.mark.parametrize("seed", range(4))
def test_a_histogram_counts_every_document_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(3, 10 ** random.integers(1, 4), size=57).tolist()
    found = lengths(documents([[1] * n for n in sizes]))
    assert len(found.counts) <= table_facts.MOST_BARS
    for i, n in enumerate(found.counts):
        assert n == sum(i * found.width < size <= (i + 1) * found.width for size in sizes)
    assert sum(found.counts) == len(sizes)
    assert (found.longest, found.mean, found.median) == (max(sizes), np.mean(sizes), np.median(sizes))


@pytest.mark.parametrize("per_sample", [1, 2])
def test_repeats_and_overlap_are_those_of_the_lists(per_sample: int) -> None:
    random = np.random.default_rng(per_sample)
    sides = [[random.integers(0, 2, size=3 + i % 2).tolist() for i in range(40)] for _ in range(2)]
    (one, two) = (Samples(documents(texts), per_sample) for texts in sides)
    lists = [[tuple(map(tuple, texts[i : i + per_sample])) for i in range(0, len(texts), per_sample)] for texts in sides]
    trained, measured = lists
    assert n_repeated(one) == len(trained) - len(set(trained))
    found = overlap(("a", one), ("b", two))
    assert found is not None
    assert found.n_samples == len(measured)
    assert found.n_equal == sum(sample in trained for sample in measured)
    prompts = [sample[0][:2] for sample in trained]
    assert found.n_equal_prompts == sum(sample[0][:2] in prompts for sample in measured)
    assert 0 < found.n_equal < found.n_equal_prompts


def test_texts_that_are_cut_elsewhere_are_not_equal() -> None:
    samples = Samples(documents([[1, 2, 3], [4, 5, 6, 7], [1, 2, 3, 4], [5, 6, 7]]), 2)
    assert n_repeated(samples) == 0


def test_a_table_too_large_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_facts, "MOST_COMPARED", 2)
    large, small = (Samples(documents([[1, 2, 3]] * n), 1) for n in (3, 2))
    assert n_repeated(large) is None
    assert n_repeated(small) == 1
    assert overlap(("a", large), ("b", small)) is None
