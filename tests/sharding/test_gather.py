"""Whole weights from the parts of ranks: their values, their gradients, and how long they live."""

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.quant.schemes import NF4, Int8, quantize
from minitune.sharding.gather import gather
from support.models import SMALL, randn
from support.ranks import Ranks
from support.sharded import Case, gathered_of, lives_of_whole_weights, order_of_sums, rows_of

PLAN = {"vocab": "data", "heads": "data", "d_ff": "data"}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def test_trees_without_parts_are_returned_as_they_are() -> None:
    w = {"a": torch.ones(2), "q": quantize(randn(4, 64, dtype=torch.float32), Int8())}
    assert gather(w) is w


@settings(max_examples=12)
@given(data=st.data(), mesh=st.sampled_from([{"data": 2}, {"data": 3}, {"replica": 2, "data": 2}]))
def test_parts_become_whole_and_gradients_become_sums(ranks: Ranks, data: Any, mesh: dict[str, int]) -> None:
    n = 4 if "replica" in mesh else mesh["data"]
    names = "abcd"[: data.draw(st.integers(1, 4), "leaves")]
    shapes = {name: data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3), name) for name in names}
    dim_of = {name: data.draw(st.sampled_from([None, *range(len(shape))]), "dim") for name, shape in shapes.items()}
    dim_of["a"] = dim_of["a"] or 0
    dtypes = {name: data.draw(st.sampled_from(DTYPES), "dtype") for name in names}
    w = {name: randn(*shape, seed=i).to(dtypes[name]) for i, (name, shape) in enumerate(shapes.items())}
    cotangents = [{name: randn(*x.shape, seed=r).to(x.dtype) for name, x in w.items()} for r in range(n)]
    results = ranks.run(n, gathered_of, w, dim_of, mesh, cotangents)
    for rank, (wholes, grads) in enumerate(results):
        # on two axes, ranks that hold copies do not add to one another's gradients
        among = [r for r in range(n) if len(mesh) == 1 or r // 2 == rank // 2]
        for name, x in w.items():
            assert torch.equal(wholes[name], x)
            assert wholes[name].is_contiguous()
            terms = [cotangents[r][name].double() for r in (among if dim_of[name] is not None else [rank])]
            close = 2.0**-7 if x.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(grads[name].double(), torch.stack(terms).sum(0), rtol=close, atol=close)


def test_quantized_weights_travel_as_codes(ranks: Ranks) -> None:
    w = {name: quantize(randn(128, 192, dtype=torch.float32), scheme) for name, scheme in (("a", Int8()), ("b", NF4()))}
    results = ranks.run(3, gathered_of, w | {"c": randn(3, 3)}, {"a": 0, "b": 1, "c": 0}, {"data": 3}, [{"c": randn(3, 3)}] * 3)
    for wholes, _ in results:
        for name, q in w.items():
            assert type(wholes[name]) is type(q)
            assert all(torch.equal(x, y) for x, y in zip(tree.leaves(wholes[name]), tree.leaves(q), strict=True))


@pytest.mark.parametrize("n_remat", [0, 1, 2])
def test_a_whole_weight_never_outlives_its_block(ranks: Ranks, n_remat: int) -> None:
    case = Case(SMALL, n_remat=n_remat)
    for seen in ranks.run(2, lives_of_whole_weights, case, rows_of(case, 2, 0), PLAN):
        assert seen == [[]] * (SMALL.n_layers + n_remat)


@pytest.mark.parametrize("n_remat", [0, 3])
def test_gradients_of_a_block_are_summed_while_the_block_before_it_computes(ranks: Ranks, n_remat: int) -> None:
    config = msgspec.structs.replace(SMALL, n_layers=3)
    case = Case(config, n_remat=n_remat)
    (seen, other) = ranks.run(2, order_of_sums, case, rows_of(case, 2, 0), PLAN)
    assert seen == other
    # one block's are on their way at a time, and weights are asked for before these have come
    backward = ["block 2", "begin", "block 1", "end", "begin", "block 0", "end", "begin", "end"]
    assert seen == [f"block {i}" for i in range(3)] + backward
