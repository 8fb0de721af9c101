"""Training states of ranks that share a model: written in parts, and read by any number of ranks."""

from pathlib import Path

import torch

from minitune.algorithms.objective import split_trainable
from minitune.checkpoint.state import load_state
from support.models import SMALL, random_params
from support.ranks import Ranks
from support.sharded import Case, dealt, on_ranks, read_whole, rows_of, saved_and_continued, step_of

FSDP = {"vocab": "data", "heads": "data", "d_ff": "data"}


def test_a_saved_state_is_continued_to_the_bit_and_read_by_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    case = Case(SMALL, trains="full", n_remat=1)
    batches = [dealt(rows_of(case, 4, seed), [2, 2]) for seed in range(2)]
    wanted = ranks.run(2, on_ranks, case, batches, FSDP, {"data": 2})
    found = ranks.run(2, saved_and_continued, case, batches, FSDP, {"data": 2}, tmp_path)
    for own, their in zip(found, wanted, strict=True):
        assert own.keys() == their.keys()
        assert all(torch.equal(own[name], their[name]) for name in own)

    # one process, three ranks, and ranks in two groups read the same weights
    frozen, trainable = split_trainable(random_params(SMALL), ("*",))
    like = step_of(case, None, frozen, trainable).init(trainable)
    whole = load_state(tmp_path / "step-00000001", like)[0].trainable
    for mesh in ({"data": 3}, {"replica": 2, "data": 2}):
        n = 3 if mesh == {"data": 3} else 4
        for read in ranks.run(n, read_whole, case, FSDP, mesh, tmp_path):
            assert all(torch.equal(read[name], x) for name, x in whole.items())
