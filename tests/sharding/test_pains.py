"""What hurts users of several GPUs elsewhere: a test for each row of the table in docs/scaling.md, by its number."""

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.models.decoder import mixer_inputs
from minitune.models.mixers.mixer import TokenPositions
from minitune.nn.attention.key_range import causal
from minitune.sharding.plans import named_plan
from support.combinations import MESHES
from support.families import config_of
from support.models import SMALL, model_of
from support.ranks import Ranks
from support.sharded import (
    Case,
    balanced_gradients,
    begun_and_merged,
    dealt,
    dtypes_of_step,
    on_ranks,
    on_shared_rows,
    rows_of,
    trained,
)

FSDP = named_plan("fsdp")
TIED = msgspec.structs.replace(SMALL, tie_embeddings=True)
MOE = config_of("qwen2_moe")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], names: Any = None) -> None:
    for name in names or wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=3)
@given(first=st.integers(0, 9), second=st.integers(0, 9))
def test_1_the_mean_is_over_the_tokens_of_all_ranks(ranks: Ranks, first: int, second: int) -> None:
    """A rank with one target and a rank with nine: the mean of their means would be another."""
    case = Case(SMALL, n_steps=1)
    rows = rows_of(case, 2, 0)
    rows = rows._replace(segment_ids=torch.ones_like(rows.segment_ids))
    rows = rows._replace(loss_mask=torch.arange(11)[None] <= torch.tensor([[first], [second]]))
    wanted = trained(case, [rows])
    for found in ranks.run(2, on_ranks, case, [dealt(rows, [1, 1])], {}, {"data": 2}):
        assert_same(found, wanted, ["metrics.loss_nats", "metrics.target_tokens", "metrics.grad_norm"])


def test_2_a_loss_of_the_router_is_scaled_by_neither_ranks_nor_micro_batches(ranks: Ranks) -> None:
    batch = rows_of(Case(MOE), 4, 0)
    wanted = balanced_gradients(MOE, batch, {})
    for mesh in ({"data": 2}, {"context": 2}):
        for found in ranks.run(2, balanced_gradients, MOE, batch, mesh):
            assert_same(found, wanted)


@pytest.mark.parametrize("plan", ["fsdp", "hsdp", "cp"])
def test_3_the_norm_of_the_gradient_is_that_of_one_process_on_every_mesh(ranks: Ranks, plan: str) -> None:
    case, mesh = Case(MOE, trains="full", n_steps=1), MESHES[plan]
    batches = [rows_of(case, 3, 0)]
    wanted = trained(case, batches)
    for found in ranks.run(math.prod(mesh.values()), on_shared_rows, case, batches, named_plan(plan), mesh):
        assert_same(found, wanted, ["metrics.grad_norm"])


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_4_a_tied_embedding_is_one_leaf_with_one_gradient(ranks: Ranks, config: Any) -> None:
    case = Case(config, trains="full", n_steps=1)
    batches = [rows_of(case, 3, 0)]
    wanted = trained(case, batches)
    assert ("trainable.lm_head.weight" in wanted) != config.tie_embeddings
    for found in ranks.run(2, on_shared_rows, case, batches, FSDP, {"data": 2}):
        assert_same(found, wanted, [name for name in wanted if "embed" in name or "lm_head" in name])


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_5_codes_travel_as_the_bytes_that_they_are_and_6_deltas_keep_their_dtype(ranks: Ranks, base: str) -> None:
    case = Case(msgspec.structs.replace(SMALL, d_model=64, d_ff=128, d_head=16), base=base, dtype=torch.bfloat16)
    for of_codes, of_deltas, of_norms in ranks.run(2, dtypes_of_step, case, FSDP):
        assert of_codes <= {torch.uint8, torch.int8, torch.bfloat16, torch.float32}
        assert of_codes & {torch.uint8, torch.int8}
        assert (of_deltas, of_norms) == ({torch.float32}, {torch.bfloat16})


def test_7_a_merge_on_parts_is_the_merge_on_whole_weights(ranks: Ranks) -> None:
    wanted = begun_and_merged(SMALL, None)
    for found in ranks.run(2, begun_and_merged, SMALL, FSDP):
        assert all(map(torch.equal, tree.leaves(found), tree.leaves(wanted)))


def test_11_an_axis_multiplies_no_gradient(ranks: Ranks) -> None:
    """Biases, norms and sinks are whole on ranks that share rows: each gradient is that of one process, whatever the mesh."""
    case = Case(config_of("gpt_oss"), trains="full", n_steps=1, dtype=torch.float64)
    batches = [rows_of(case, 2, 0)]
    wanted = trained(case, batches)
    for mesh in ({"context": 2}, {"data": 2, "context": 2}):
        for found in ranks.run(2 * mesh.get("data", 1), on_shared_rows, case, batches, {}, mesh):
            assert_same(found, wanted, [name for name in wanted if name.endswith(("bias", "norm.weight", "sinks"))])


def test_13_what_a_padded_place_holds_changes_nothing(ranks: Ranks) -> None:
    case = Case(SMALL, n_steps=1)
    rows = rows_of(case, 3, 0)
    others = rows._replace(tokens=torch.where(rows.segment_ids > 0, rows.tokens, (rows.tokens + 1) % SMALL.vocab_size))
    assert not torch.equal(rows.tokens, others.tokens)
    for mesh in ({"data": 2}, {"context": 2}):
        pairs = [ranks.run(2, on_shared_rows, case, [one], {}, mesh) for one in (rows, others)]
        for found, other in zip(*pairs, strict=True):
            assert all(torch.equal(found[name], other[name]) for name in found)


def test_14_angles_are_computed_in_float32_where_they_are_needed() -> None:
    """No buffer that a cast or a move could spoil: at position 100,001 a bfloat16 model rounds its angles once."""
    assert model_of(SMALL).shapes().keys() == model_of(SMALL).init(0).keys()
    positions = torch.tensor([[100_001]])
    where = TokenPositions(positions, 1, causal(1, positions.device))
    (narrow,), (wide,) = (mixer_inputs(SMALL, where, dtype).values() for dtype in (torch.bfloat16, torch.float32))
    for found, exact in zip(narrow.rope, wide.rope, strict=True):
        assert torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 2, "context": 2}], ids=str)
def test_15_a_rank_without_rows_and_a_batch_without_targets_end(ranks: Ranks, mesh: dict[str, int]) -> None:
    case = Case(SMALL, n_steps=1)
    one_row, nothing = rows_of(case, 1, 0), rows_of(case, 2, 0, torch.zeros(2, dtype=torch.bool))
    wanted = trained(case, [one_row, nothing])
    for found in ranks.run(mesh["data"] * mesh.get("context", 1), on_shared_rows, case, [one_row, nothing], {}, mesh):
        assert_same(found, wanted, [name for name in wanted if name.startswith("trainable")])
        assert bool(found["metrics.skipped"])


def test_16_recomputed_blocks_choose_the_same_experts_to_the_bit(ranks: Ranks) -> None:
    batches = [rows_of(Case(MOE), 3, 0)]
    results = [
        ranks.run(2, on_shared_rows, Case(MOE, trains="full", n_steps=1, n_remat=n), batches, FSDP, {"data": 2})
        for n in (0, MOE.n_layers)
    ]
    for kept, recomputed in zip(*results, strict=True):
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
