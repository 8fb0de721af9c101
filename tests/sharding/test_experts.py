"""Ranks that share the experts of a mixture take the step that one process takes on all rows."""

from typing import Any

import msgspec
import pytest
import torch

from minitune import tree
from minitune.sharding.plans import named_plan
from support.families import config_of
from support.ranks import Ranks
from support.sharded import Case, dealt, on_ranks, rows_of, trained

LAYOUTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama4_text"]


def mixture(name: str) -> Any:
    """Small model of a family with a number of experts that four ranks share evenly."""
    config = config_of(name)
    return msgspec.structs.replace(config, experts=msgspec.structs.replace(config.experts, n_experts=4))


CASES = {
    **{f"{name} {trains}": Case(mixture(name), trains=trains, n_remat=n % 2, dtype=torch.float64) for n, name in enumerate(LAYOUTS) for trains in ("lora", "full")},
}


def check(ranks: Ranks, case: Case, mesh: dict[str, int], batches: list[Any], sizes: list[int]) -> None:
    wanted = trained(case, batches)
    parts = [dealt(batch, sizes) for batch in batches]
    for found in ranks.run(len(sizes), on_ranks, case, parts, named_plan("ep"), mesh):
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            close: dict[str, float] = {"rtol": 2e-6, "atol": 2e-6 * max(1.0, float(x.abs().max()) if x.numel() else 1.0)}
            torch.testing.assert_close(found[name], x, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_ranks_take_the_step_of_one_process(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    check(ranks, case, {"data": 1, "expert": 2}, [rows_of(case, 3, seed) for seed in range(2)], [2, 1])
