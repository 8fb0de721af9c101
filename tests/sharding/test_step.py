"""Ranks that share a model take the step that one process takes on all their rows."""

import math
import re
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.optim.eight_bit import AdamW8bit
from minitune.optim.muon import Muon
from minitune.optim.sgd import SGD
from minitune.quant.schemes import NF4, Int4, Int8
from support.families import config_of
from support.models import SMALL
from support.ranks import Ranks
from support.sharded import Case, begun_and_merged, both_steps, dealt, held, on_ranks, quantized_hidden, refusal, rows_of, trained

FSDP = {"vocab": "data", "heads": "data", "d_ff": "data"}
MESHES: list[dict[str, int]] = [{"data": 2}, {"data": 4}, {"replica": 2, "data": 2}]
TIED = msgspec.structs.replace(SMALL, tie_embeddings=True)
CASES = {
    "sft lora": Case(SMALL),
    "sft lora, recomputed": Case(SMALL, n_remat=2),
    "sft full": Case(SMALL, trains="full", n_remat=1),
    "sft full, tied": Case(TIED, trains="full"),
    "sft dora": Case(SMALL, trains="dora", n_remat=1),
    "dpo lora": Case(SMALL, loss="dpo"),
    "dpo full, tied": Case(TIED, loss="dpo", trains="full", n_remat=2),
    "kd lora": Case(SMALL, loss="kd", n_remat=2),
    "kd full": Case(SMALL, loss="kd", trains="full"),
    "sft full, experts": Case(config_of("qwen2_moe"), trains="full", n_remat=1),
    "sft lora, joined experts": Case(config_of("gpt_oss"), n_remat=1),
}


def check(ranks: Ranks, case: Case, mesh: dict[str, int], sizes: list[int], masks: list[torch.Tensor]) -> None:
    batches = [rows_of(case, sum(sizes), seed, mask) for seed, mask in enumerate(masks)]
    wanted = trained(case, batches)
    results = ranks.run(len(sizes), on_ranks, case, [dealt(batch, sizes) for batch in batches], FSDP, mesh)
    for found in results:
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            close: dict[str, float] = {"rtol": 1e-6, "atol": 2e-6 * max(1.0, float(x.abs().max()) if x.numel() else 1.0)}
            torch.testing.assert_close(found[name], x, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_ranks_take_the_step_of_one_process(ranks: Ranks, name: str, mesh: dict[str, int]) -> None:
    sizes = [3, 2] if mesh == {"data": 2} else [2, 1, 1, 1]
    check(ranks, CASES[name], mesh, sizes, [torch.ones(5, dtype=torch.bool)] * 2)


@pytest.mark.parametrize("name", ["sft full", "sft dora"])
def test_a_mesh_of_one_rank_is_one_process(ranks: Ranks, name: str) -> None:
    check(ranks, CASES[name], {"data": 1}, [5], [torch.ones(5, dtype=torch.bool)] * 2)


@settings(max_examples=12)
@given(data=st.data(), micro_batch=st.sampled_from([1, 2, None]))
def test_any_rows_and_any_masks_on_any_rank(ranks: Ranks, data: Any, micro_batch: int | None) -> None:
    """By SGD: AdamW divides the rounding of a small gradient by that gradient."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3), "rows of ranks")
    masks = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)), "rows with targets"))]
    trains = data.draw(st.sampled_from(["full", "lora"]), "trains")
    n_remat = data.draw(st.integers(0, 2), "recomputed")
    case = Case(SMALL, trains=trains, micro_batch=micro_batch, n_remat=n_remat, optimizer=SGD(lr=0.3))
    check(ranks, case, {"data": len(sizes)}, sizes, masks)


def test_the_step_is_that_of_fully_shard(ranks: Ranks) -> None:
    case, rows = Case(SMALL, n_remat=1), dealt(rows_of(Case(SMALL), 5, 3), [3, 2])
    for (theirs, their_norm), (ours, norm) in ranks.run(2, both_steps, case, rows, FSDP, {"data": 2}):
        torch.testing.assert_close(norm, their_norm, rtol=1e-5, atol=0)
        assert theirs.keys() == ours.keys()
        for name, x in theirs.items():
            torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_remat", [0, 2])
@pytest.mark.parametrize("scheme", [Int8(), NF4(), Int4()], ids=lambda scheme: type(scheme).__name__)
def test_a_quantized_base_in_parts_is_the_same_to_the_bit(ranks: Ranks, scheme: Any, n_remat: int) -> None:
    config = config_of("llama")
    config = msgspec.structs.replace(config, n_layers=2, d_model=64, d_ff=128, d_head=16)
    tokens = rows_of(Case(config), 2, 0).tokens
    logits, grads = quantized_hidden(config, scheme, tokens, None, n_remat)
    for n in (1, 2, 3):
        for found, their_grads in ranks.run(n, quantized_hidden, config, scheme, tokens, FSDP, n_remat):
            assert torch.equal(found, logits)
            assert all(map(torch.equal, tree.leaves(their_grads), tree.leaves(grads)))


@pytest.mark.parametrize("optimizer", [Muon(lr=0.1), AdamW8bit(lr=0.1)], ids=lambda rule: type(rule).__name__)
def test_an_optimizer_that_needs_whole_leaves_is_refused(ranks: Ranks, optimizer: Any) -> None:
    for said in ranks.run(2, refusal, FSDP, optimizer):
        assert re.match(r"optim: \w+ updates model\.embed_tokens\.weight, of which each rank holds a part, .* use AdamW", said)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_rank_holds_its_share_of_parameters_and_state(ranks: Ranks, mesh: dict[str, int]) -> None:
    config = msgspec.structs.replace(SMALL, d_model=96, d_ff=192, vocab_size=384)
    alone = held(config, None, None)
    for own in ranks.run(math.prod(mesh.values()), held, config, FSDP, mesh):
        assert own == pytest.approx(alone / mesh["data"], rel=0.05)


def test_deltas_begin_and_merge_on_parts_as_on_whole_weights(ranks: Ranks) -> None:
    wanted = begun_and_merged(SMALL, None)
    for found in ranks.run(2, begun_and_merged, SMALL, FSDP):
        assert all(map(torch.equal, tree.leaves(found), tree.leaves(wanted)))
