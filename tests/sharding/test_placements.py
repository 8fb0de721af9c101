"""Placements of weights on meshes: what each rank holds, without any rank but this process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitune import models, tree
from minitune.errors import InputError
from minitune.models.weights import dims
from minitune.quant.schemes import quantize
from minitune.sharding.mesh import Mesh, device_mesh, n_ranks
from minitune.sharding.placements import check_plan, part_shape, placements, shard, shard_leaf
from minitune.sharding.plans import named_plan, read_plan
from support.fake_ranks import as_rank
from support.families import config_of
from support.models import SMALL, model_of, randn, random_params
from support.paths import ROOT

DIMS = {"w": ("d_ff", "d_model")}


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    plan=st.dictionaries(st.sampled_from(["d_ff", "d_model"]), st.sampled_from(["replica", "data"])),
)
def test_parts_are_those_of_torch_and_make_up_the_whole(shape: Any, sizes: Any, plan: dict[str, str]) -> None:
    mesh = {"replica": sizes[0], "data": sizes[1]}
    if len(set(plan.values())) < len(plan):
        with pytest.raises(InputError, match="on axis"):
            placements("w", shape, DIMS["w"], plan, mesh)
        return
    w = randn(*shape)
    placed = placements("w", shape, DIMS["w"], plan, mesh)
    largest = [0, 0]
    whole = torch.zeros_like(w)
    for rank in range(n_ranks(mesh)):
        with as_rank(rank, mesh) as ranks:
            part = shard_leaf(w, placed, ranks)
            wanted = distribute_tensor(w, ranks, placed, src_data_rank=None)
            if not plan:
                assert part is w
                return
            assert isinstance(part, DTensor)
            assert part.placements == placed
            assert part.shape == w.shape
            torch.testing.assert_close(part.to_local(), wanted.to_local(), rtol=0, atol=0)
            assert part.to_local().untyped_storage().nbytes() == 8 * part.to_local().numel()
            largest = [max(pair) for pair in zip(largest, part.to_local().shape, strict=True)]
            coordinate = ranks.get_coordinate()
        rows, columns = (slice(None), slice(None))
        for dim, axis in plan.items():
            n, i = mesh[axis], coordinate[list(mesh).index(axis)]
            size = shape[DIMS["w"].index(dim)]
            longest = (size + n - 1) // n
            cut = slice(min(i * longest, size), min((i + 1) * longest, size))
            rows, columns = (cut, columns) if dim == "d_ff" else (rows, cut)
        whole[rows, columns] = part.to_local()
    assert torch.equal(whole, w)
    assert part_shape(shape, placed, mesh) == tuple(largest)


@pytest.mark.parametrize("name", sorted(models.FAMILIES))
@pytest.mark.parametrize("plan", ["dp", "fsdp", "hsdp"])
def test_named_plans_cut_every_matrix_of_every_family_once(name: str, plan: str) -> None:
    config = config_of(name)
    mesh = {"replica": 2, "data": 3}
    check_plan(named_plan(plan), dims(config), mesh)
    shapes = model_of(config).shapes()
    small = {"router", "gate", "shared_expert_gate"}
    for weight, found in dims(config).items():
        placed = placements(weight, shapes[weight], found, named_plan(plan), mesh)
        assert placed[0] == Replicate()
        is_cut = plan != "dp" and len(found) > 1 and weight.split(".")[-2] not in small and not weight.endswith("down_proj_bias")
        assert (placed[1] != Replicate()) == is_cut, weight


@pytest.mark.parametrize("mesh", [{"data": 1024}, {"replica": 16, "data": 64}])
def test_a_thousand_ranks_share_a_model_that_no_machine_holds(mesh: Mesh) -> None:
    model = models.open_config(ROOT / "configs" / "models" / "llama-3.1-405b.toml")
    weights = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in model.shapes().items()}
    with as_rank(1000, mesh) as ranks:
        params = shard(weights, dims(model.config), named_plan("fsdp"), ranks)
        parts = [w.to_local() if isinstance(w, DTensor) else w for w in params.values()]
    assert all(part.is_meta for part in parts)
    assert tree.n_bytes(parts) == pytest.approx(tree.n_bytes(weights) / mesh["data"], rel=0.02)  # the norms are whole


def test_codes_and_scales_are_cut_by_the_same_dim() -> None:
    from minitune.quant.schemes import NF4, Int4, Int8

    w = randn(128, 256, dtype=torch.float32)
    for scheme in (Int8(), Int4(), NF4()):
        q = quantize(w, scheme)
        for dim in (0, 1):
            placed = tuple(Shard(dim) if axis else Replicate() for axis in range(2))
            with as_rank(3, {"replica": 2, "data": 2}) as ranks:
                part = shard_leaf(q, placed, ranks)
                assert type(part) is type(q)
                assert part.codes.placements == placed
                assert part.codes.to_local().numel() == q.codes.numel() // 2
                assert torch.equal(part.codes.to_local(), q.codes.chunk(2, dim)[1])
                whole = sum(x.numel() for x in tree.leaves(q))
                held = sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in tree.leaves(part))
                assert held <= whole / 2 + 130, scheme


def test_vectors_and_what_the_plan_leaves_out_stay_the_tensors_they_were() -> None:
    params = random_params(SMALL)
    with as_rank(1, {"data": 2}) as ranks:
        parts = shard(params, dims(SMALL), {"heads": "data"}, ranks)
        for name, w in params.items():
            assert (parts[name] is w) == ("self_attn" not in name), name


MISTAKES = [
    ({"head": "data"}, r"the plan cuts 'head', which no matrix of this model has, expected one of .*did you mean 'heads'"),
    (
        {"d_head": "data"},
        r"the plan cuts 'd_head', which no matrix of this model has, expected one of d_ff, d_model",
    ),
    ({"experts": "data"}, r"the plan cuts 'experts', which no matrix of this model has"),
    ({"heads": "dta"}, r"the plan puts heads on axis 'dta', expected an axis of the mesh: replica, data; did you mean 'data'"),
    (
        {"d_ff": "data", "d_model": "data"},
        r"has d_ff and d_model on axis 'data' both, expected one dim on an axis; leave d_ff or d_model out of the plan",
    ),
]


@pytest.mark.parametrize(("plan", "message"), MISTAKES)
def test_a_plan_that_can_not_be_is_refused(plan: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_plan(plan, dims(SMALL), {"replica": 2, "data": 2})


def test_messages_name_the_tensor_and_its_size() -> None:
    with pytest.raises(InputError, match=r"sharding: x\.w \[3, 5\] has d_ff and d_model on axis 'data' both"):
        placements("x.w", (3, 5), ("d_ff", "d_model"), {"d_ff": "data", "d_model": "data"}, {"data": 2})
    with pytest.raises(TypeError, match=r"x\.w \[3, 5\] has dims d_ff, expected one for each"):
        placements("x.w", (3, 5), ("d_ff",), {}, {"data": 2})


def test_a_mesh_of_another_number_of_ranks_is_refused() -> None:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with pytest.raises(InputError, match=r"the mesh has 6 ranks \(replica 2 x data 3\), expected the 4 that were started"):
            device_mesh({"replica": 2, "data": 3}, "cpu")
    finally:
        dist.destroy_process_group()


def test_a_plan_is_found_by_name_or_read_from_a_file(tmp_path: Path) -> None:
    assert named_plan("fsdp") == {"vocab": "data", "heads": "data", "d_ff": "data"}
    with pytest.raises(
        InputError, match=r"no plan 'fsd', expected one of cp, dp, ep, fsdp, hsdp, tp_fsdp, .*; did you mean 'fsdp'"
    ):
        named_plan("fsd")
    file = tmp_path / "plan.toml"
    file.write_text('heads = "data"\nd_ff = 2\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"sharding: .*plan\.toml:2: d_ff is 2, expected the name of an axis"):
        read_plan(file)
