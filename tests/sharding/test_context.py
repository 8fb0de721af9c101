"""Ranks that share the tokens of their rows take the step that one process takes on whole rows."""

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.errors import InputError
from minitune.nn.dropout import dropped
from minitune.optim.sgd import SGD
from minitune.sharding.context import check_heads
from minitune.sharding.mesh import n_sharers
from minitune.sharding.plans import named_plan
from minitune.types import Dropout
from support.families import config_of
from support.models import SMALL
from support.ranks import Ranks
from support.sharded import Case, lengths_that_are_seen, on_shared_rows, plain_and_compiled_losses, rows_of, trained

TIED = msgspec.structs.replace(SMALL, tie_embeddings=True)
CASES = {
    "sft lora": Case(SMALL),
    "sft full, tied, recomputed": Case(TIED, trains="full", n_remat=2),
    "sft lora, key heads that do not divide": Case(msgspec.structs.replace(SMALL, n_heads=6, n_kv_heads=3)),
    "sft dora": Case(SMALL, trains="dora", n_remat=1),
    "dpo lora": Case(SMALL, loss="dpo"),
    "dpo full": Case(SMALL, loss="dpo", trains="full", n_remat=1),
    "kd lora": Case(SMALL, loss="kd", n_remat=2),
    "sft full, experts": Case(config_of("qwen2_moe"), trains="full", n_remat=1),
    "sft lora, sinks and windows": Case(config_of("gpt_oss"), n_remat=1, dtype=torch.float64),
    "sft lora, caps": Case(config_of("gemma2"), n_remat=1, dtype=torch.float64),
    "sft lora, chunks": Case(config_of("llama4_text"), dtype=torch.float64),
}


def check(ranks: Ranks, case: Case, plan: str, mesh: dict[str, int], batches: list[Any]) -> None:
    wanted = trained(case, batches)
    n = mesh.get("data", 1) * mesh["context"]
    for found in ranks.run(n, on_shared_rows, case, batches, named_plan(plan), mesh):
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            close: dict[str, float] = {"rtol": 2e-6, "atol": 2e-6 * max(1.0, float(x.abs().max()) if x.numel() else 1.0)}
            torch.testing.assert_close(found[name], x, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_ranks_take_the_step_of_one_process(ranks: Ranks, name: str) -> None:
    check(ranks, CASES[name], "dp", {"context": 2}, [rows_of(CASES[name], 3, seed) for seed in range(2)])


# others on weights in parts are in test_combinations.py
@pytest.mark.parametrize("name", ["sft full, tied, recomputed", "sft full, experts", "sft lora, sinks and windows"])
def test_ranks_that_share_the_weights_too_take_it(ranks: Ranks, name: str) -> None:
    mesh = {"data": 2, "context": 2}
    check(ranks, CASES[name], "cp", mesh, [rows_of(CASES[name], 3, seed) for seed in range(2)])


@settings(max_examples=6)
@given(data=st.data(), n_tokens=st.integers(1, 9), n=st.sampled_from([2, 4]))
def test_any_masks_and_any_lengths(ranks: Ranks, data: Any, n_tokens: int, n: int) -> None:
    """Rows shorter than there are ranks, and targets that lie on one rank alone, among them.

    By SGD: AdamW divides the rounding of a small gradient by that gradient.
    """
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3 * n_tokens, max_size=3 * n_tokens), "targets"))
    trains = data.draw(st.sampled_from(["full", "lora"]), "trains")
    case = Case(SMALL, trains=trains, micro_batch=2, optimizer=SGD(lr=0.3))
    rows = tree.map(lambda x: x[:, :n_tokens], rows_of(case, 3, 0))
    rows = rows._replace(loss_mask=rows.loss_mask & mask.view(3, n_tokens))
    check(ranks, case, "dp", {"context": n}, [rows])


def test_a_block_sees_the_tokens_of_its_rank_and_attention_those_of_all(ranks: Ranks) -> None:
    for seen in ranks.run(2, lengths_that_are_seen, 11):
        assert seen == {"block": {6}, "attention": {12}, "heads": {SMALL.n_heads // 2}, "hidden": 11, "logits": 11, "probed": 11}


def test_a_compiled_block_exchanges_as_another_does(ranks: Ranks) -> None:
    for plain, compiled in ranks.run(2, plain_and_compiled_losses):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


def test_places_of_dropout_are_those_of_the_whole_row() -> None:
    x, seeds = torch.randn(2, 10, 7), torch.tensor([5, 9])
    whole = dropped(x, Dropout(seeds, torch.tensor([0.5])))
    parts = [dropped(x[:, i : i + 5], Dropout(seeds, torch.tensor([0.5]), torch.tensor(i))) for i in (0, 5)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_heads_are_dealt_out_evenly_or_not_at_all() -> None:
    for even in (1, 2, 4, 8):
        check_heads(8, even)
    for n_heads, n in ((8, 3), (4, 8)):
        with pytest.raises(InputError, match=f"the axis context has {n} ranks, among which {n_heads} heads"):
            check_heads(n_heads, n)


def test_ranks_of_the_same_rows_are_neighbours() -> None:
    assert n_sharers({"replica": 3, "data": 2, "context": 4}) == 4
    with pytest.raises(InputError, match="the mesh has the axes context, data, expected context last"):
        n_sharers({"context": 2, "data": 2})
