"""From a file to batches in one call: what the tokenizer, the template, the cache and the cursor give by themselves."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from minitune import tree
from minitune.data import Source, preference, read_batches, supervised
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.text.chat import open_text
from minitune.types import Pairs
from support.paths import ROOT

ORDERS = Source("demo/orders-heldout.jsonl", format="instruct", seq_len=230)
FILES = ROOT / "minitune/demo"
TEXT = open_text(FILES / "model")


def assert_equal(found: tree.Tree, wanted: tree.Tree) -> None:
    same = tree.map(lambda x, y: torch.tensor(x.equal(y)), found, wanted)
    assert all(tree.leaves(same))


def test_one_pass_has_every_row_once_in_its_order(tmp_path: Path) -> None:
    located = ORDERS.with_paths(lambda path: [FILES / Path(path).name])
    dataset = supervised.prepare(located, *TEXT, tmp_path)
    wanted, found = list(supervised.batches(dataset, located, 50)), list(read_batches(ORDERS, "demo", n_rows=50))
    assert len(found[-1].tokens) < 50
    assert_equal(found, wanted)


def test_a_seed_gives_endless_shuffled_epochs(tmp_path: Path) -> None:
    located = ORDERS.with_paths(lambda path: [FILES / Path(path).name])
    dataset = supervised.prepare(located, *TEXT, tmp_path)
    n_rows = len(dataset.order(3, 0))
    found = list(islice(read_batches(ORDERS, "demo", n_rows=n_rows, seed=3), 2))
    first, after = supervised.take(dataset, Cursor(0, 0), n_rows, located, 3)
    second, _ = supervised.take(dataset, after, n_rows, located, 3)
    assert_equal(found, [first, second])
    assert not tree.leaves(first)[0].equal(tree.leaves(second)[0])


def test_pairs_become_pairs(tmp_path: Path) -> None:
    rows = (FILES / "orders-pairs.jsonl").read_text("utf-8").splitlines()[:5]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), "utf-8")
    source = Source(str(tmp_path / "pairs.jsonl"), format="pairs", seq_len=256)
    found = list(read_batches(source, "demo", n_rows=2))
    assert [type(batch) for batch in found] == [Pairs] * 3
    assert_equal(found, list(preference.batches(preference.prepare(source, *TEXT, tmp_path), source, 2)))


def test_faults_are_told_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        read_batches(Source("missing.jsonl", "chat", seq_len=9), "demo", n_rows=2)
    with pytest.raises(InputError, match="has 1024 tokens, more than the model's 1000"):
        read_batches(ORDERS, "demo", n_rows=2, vocab_size=1000)
