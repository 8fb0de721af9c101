"""Ranks that share linear maps and tokens take the step that one process takes on whole weights and rows."""

import re
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.errors import InputError
from minitune.models.parallel import check_sharing
from minitune.nn.dropout import dropped
from minitune.optim.sgd import SGD
from minitune.sharding.plans import named_plan
from minitune.types import Dropout
from support.families import config_of
from support.models import SMALL, random_params
from support.ranks import Ranks
from support.sharded import Case, on_shared_rows, rows_of, trained
from support.tensor_parallel import losses_with_dropout, plain_and_compiled_losses, refusals, sizes_that_are_seen

TIED = msgspec.structs.replace(SMALL, tie_embeddings=True)
BIASED = msgspec.structs.replace(SMALL, attention_bias=True, mlp_bias=True, d_ff=27)
# by gradients alone: Adam divides by their size, which makes the rounding of one near zero large
FULL: dict[str, Any] = {"trains": "full", "optimizer": SGD(lr=0.5)}
CASES = {
    "sft lora": Case(SMALL),
    "sft full, tied, recomputed": Case(TIED, n_remat=2, **FULL),
    "sft full, biases, d_ff that does not divide": Case(BIASED, n_remat=1, **FULL),
    "sft dora": Case(SMALL, trains="dora", n_remat=1),
    "sft lora, int8": Case(SMALL, base="int8"),
    "dpo lora": Case(SMALL, loss="dpo"),
    "dpo full": Case(SMALL, loss="dpo", n_remat=1, **FULL),
    "kd lora": Case(SMALL, loss="kd", n_remat=2),
    "sft lora, caps": Case(config_of("gemma2"), n_remat=1, dtype=torch.float64),
    "sft lora, norms of heads": Case(config_of("qwen3"), n_remat=1, dtype=torch.float64),
}
# attention is shared along tensor, and the experts are cut along data
EXPERTS = {"vocab": "tensor", "heads": "tensor", "d_model": "data"}
MIXTURES = {
    "sinks and windows": Case(config_of("gpt_oss"), n_remat=1, dtype=torch.float64),
    "chunks": Case(config_of("llama4_text"), dtype=torch.float64),
    "full": Case(config_of("qwen2_moe"), n_remat=1, **FULL),
}


def check(ranks: Ranks, case: Case, plan: Any, mesh: dict[str, int], batches: list[Any]) -> None:
    wanted = trained(case, batches)
    n = mesh.get("data", 1) * mesh.get("context", 1) * mesh["tensor"]
    for found in ranks.run(n, on_shared_rows, case, batches, plan, mesh):
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            close: dict[str, float] = {"rtol": 2e-6, "atol": 2e-6 * max(1.0, float(x.abs().max()) if x.numel() else 1.0)}
            torch.testing.assert_close(found[name], x, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def batches_of(case: Case) -> list[Any]:
    return [rows_of(case, 3, seed) for seed in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_take_the_step_of_one_process(ranks: Ranks, name: str) -> None:
    check(ranks, CASES[name], named_plan("tp_fsdp"), {"data": 1, "tensor": 2}, batches_of(CASES[name]))


@pytest.mark.parametrize("other", ["data", "context"])
@pytest.mark.parametrize("name", ["sft full, tied, recomputed", "dpo lora"])
def test_beside_other_axes_too(ranks: Ranks, name: str, other: str) -> None:
    plan = {**named_plan("tp_fsdp"), "d_model": other}
    check(ranks, CASES[name], plan, {other: 2, "tensor": 2}, batches_of(CASES[name]))


@pytest.mark.parametrize("name", MIXTURES)
def test_attention_of_a_mixture_is_shared_beside_its_experts(ranks: Ranks, name: str) -> None:
    check(ranks, MIXTURES[name], EXPERTS, {"data": 1, "tensor": 2}, batches_of(MIXTURES[name]))


@settings(max_examples=5)
@given(data=st.data(), n_tokens=st.integers(1, 9))
def test_any_masks_and_any_lengths(ranks: Ranks, data: Any, n_tokens: int) -> None:
    """Rows shorter than there are ranks, and targets that lie on one rank alone, among them.

    By SGD: AdamW divides the rounding of a small gradient by that gradient.
    """
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3 * n_tokens, max_size=3 * n_tokens), "targets"))
    trains = data.draw(st.sampled_from(["full", "lora"]), "trains")
    case = Case(SMALL, trains=trains, micro_batch=2, optimizer=SGD(lr=0.3))
    rows = tree.map(lambda x: x[:, :n_tokens], rows_of(case, 3, 0))
    rows = rows._replace(loss_mask=rows.loss_mask & mask.view(3, n_tokens))
    check(ranks, case, named_plan("tp_fsdp"), {"data": 1, "tensor": 2}, [rows])


def test_a_rank_has_a_part_of_the_maps_and_of_the_tokens(ranks: Ranks) -> None:
    heads, keys = SMALL.n_heads // 2, SMALL.n_kv_heads * SMALL.d_head // 2
    d_ff = -(-SMALL.d_ff // 2), SMALL.d_ff // 2
    for rank, seen in enumerate(ranks.run(2, sizes_that_are_seen, 11, {"data": 1, "tensor": 2})):
        maps = {"self_attn.k_proj.weight": (keys, SMALL.d_model), "mlp.down_proj.weight": (SMALL.d_model, d_ff[rank])}
        assert seen.pop("at rest") <= 0.55 * sum(w.numel() for w in random_params(SMALL).values() if w.ndim > 1)
        assert seen == {"block": {6}, "attention": {(heads, 12)}, "maps": maps, "hidden": 11, "logits": 11}


def test_a_compiled_block_computes_as_another_does(ranks: Ranks) -> None:
    for plain, compiled in ranks.run(2, plain_and_compiled_losses):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", [{"data": 1, "tensor": 2}, {"data": 1, "context": 2, "tensor": 2}], ids=str)
def test_what_is_dropped_is_what_one_process_drops(ranks: Ranks, mesh: dict[str, int]) -> None:
    wanted = losses_with_dropout(None, 11)
    for found in ranks.run(2 * mesh.get("context", 1), losses_with_dropout, mesh, 11):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


def test_draws_of_some_features_are_those_of_all() -> None:
    x, seeds, rate = torch.randn(2, 10, 7), torch.tensor([5, 9]), torch.tensor([0.5])
    whole = dropped(x, Dropout(seeds, rate))
    parts = [dropped(x[..., i : i + 4], Dropout(seeds, rate, part=(i, 7))) for i in (0, 4)]
    assert torch.equal(torch.cat(parts, dim=-1), whole)


def test_weights_that_ranks_cannot_share_are_refused(ranks: Ranks) -> None:
    for codes, whole in ranks.run(2, refusals):
        assert "self_attn.q_proj.weight [24, 12] is of nf4, whose scales the 2 ranks of the axis tensor can't share" in codes
        assert "no weight is cut along it" in whole


@pytest.mark.parametrize(
    ("family", "plan", "n", "words"),
    [
        ("llama", {"heads": "data"}, 2, 'expected a plan with heads = "tensor"'),
        ("llama", {"heads": "tensor", "d_model": "tensor"}, 2, 'the plan has d_model = "tensor"'),
        ("llama", {"heads": "tensor"}, 3, "the axis tensor has 3 ranks, among which 4 heads of queries and 2 of keys"),
        ("phi3", {"heads": "tensor"}, 2, "queries, keys and values in one weight"),
        ("olmo2", {"heads": "tensor"}, 2, "norms the queries of all heads together"),
        ("mixtral", {"heads": "tensor", "d_ff": "tensor"}, 2, "and the model has experts"),
    ],
)
def test_models_that_ranks_cannot_share_are_refused(family: str, plan: dict[str, str], n: int, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        check_sharing(config_of(family), plan, {"data": 2, "tensor": n})
