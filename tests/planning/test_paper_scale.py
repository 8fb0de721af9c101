"""Scale on paper: models on 64, 256 and 1,024 ranks that are not there, beside closed forms and torch's own parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitune import models, tree
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.weights import dims, shapes
from minitune.optim.adamw import AdamW
from minitune.planning.devices import open_device
from minitune.planning.memory import peak_memory
from minitune.planning.mesh import ALONE, Mesh, mesh_under
from minitune.planning.rank_leaves import local_bytes, local_part
from minitune.planning.step_spec import StepSpec
from minitune.planning.timing import timing
from minitune.planning.traffic import RankGroup, traffic, transfers
from minitune.sharding.mesh import device_mesh
from minitune.sharding.placements import shard
from minitune.sharding.plans import named_plan
from support.paths import ROOT

N_TOKENS = 4096


@cache
def shape(name: str) -> Model:
    return models.open_config(ROOT / f"configs/models/{name}.toml")


def meta(model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return {name: torch.empty(size, device="meta", dtype=dtype) for name, size in shapes(model.config).items()}


@contextmanager
def as_rank(mesh: dict[str, int]) -> Iterator[DeviceMesh]:
    n = mesh["replica"] * mesh["data"]
    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    try:
        yield device_mesh(mesh, "cpu")
    finally:
        dist.destroy_process_group()


def parts_and_copies(n: int, copies: int = 1) -> Mesh:
    return mesh_under({"replica": copies, "data": n}, "hsdp")


def step_of(name: str, mesh: Mesh, *, remat: bool, lora: Lora | None = None) -> StepSpec:
    return step_with(shape(name), mesh, remat=remat, lora=lora)


def step_with(model: Model, mesh: Mesh, *, remat: bool, lora: Lora | None = None) -> StepSpec:
    params = meta(model)
    mesh = mesh.for_model(model.config)
    model = model._replace(n_remat=model.config.n_layers if remat else 0)
    trainable = meta(model, torch.float32)
    if lora is not None:
        with torch.device("meta"):
            trainable = lora.like(params)
    optimizer, device = AdamW(lr=1e-4), torch.device("meta")
    return StepSpec(model, params, trainable, lora, optimizer, CrossEntropy(), device, 1, N_TOKENS, mesh=mesh)


@pytest.mark.parametrize("mesh", [{"replica": 1, "data": 64}, {"replica": 32, "data": 8}, {"replica": 16, "data": 64}])
def test_a_70b_is_divided_as_torch_divides_it(mesh: dict[str, int]) -> None:
    """Every matrix along one dim: the parts of a rank, and so what all that trains takes there."""
    model = shape("llama-3-70b")
    params, plan = meta(model), named_plan("fsdp")
    planned = mesh_under(mesh, "fsdp").for_model(model.config)
    with as_rank(mesh) as ranks:
        parts = shard(params, dims(model.config), plan, ranks)
        local = {name: getattr(part, "to_local", lambda part=part: part)() for name, part in parts.items()}
    assert tree.n_bytes(local) == local_bytes(params, planned)
    assert {name: x.shape for name, x in local.items()} == {name: x.shape for name, x in local_part(params, planned).items()}
    # closed form: sizes of a 70B are multiples of 64, so matrices are divided without rest and vectors are whole
    n_params, n_vectors = 70_553_706_496, (2 * 80 + 1) * 8192
    assert local_bytes(params, planned) == 2 * ((n_params - n_vectors) // mesh["data"] + n_vectors)


@pytest.mark.parametrize(("n", "copies"), [(64, 1), (256, 1), (1024, 1), (64, 16)])
def test_memory_and_traffic_of_full_training_are_those_of_the_closed_forms(n: int, copies: int) -> None:
    step = step_of("llama-3-70b", parts_and_copies(n, copies), remat=True)
    parts, sent = peak_memory(step), traffic(step)
    n_vectors = (2 * 80 + 1) * 8192
    matrices = 70_553_706_496 - n_vectors
    # heads of 1,024 ranks: 8 key heads have 1,024 rows, 128,256 words 125.25 for each, so the largest part is a little more
    slack = 0.002 if n <= 64 else 0.01
    assert parts["trained"] == pytest.approx(4 * (matrices / n + n_vectors), rel=slack)
    assert parts["optimizer"] == pytest.approx(8 * (matrices / n + n_vectors), rel=slack)
    block = (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672) * 2
    assert parts["gathered"] in (2 * block, 2 * 128256 * 8192)
    assert parts["activations"] <= 81 * N_TOKENS * 8192 * 2
    # bfloat16 weights forward, those of blocks once more; float32 gradients after the backward, and between copies
    outside = 2 * 128256 * 8192
    in_blocks = matrices - outside
    assert sent.gathered == pytest.approx(2 * (2 * in_blocks + outside) * (n - 1) / n)
    assert sent.scattered == pytest.approx(4 * matrices * (n - 1) / n)
    on_all = 2 * 4 * n_vectors * (n * copies - 1) / (n * copies)
    assert sent.summed == pytest.approx(2 * 4 * matrices / n * (copies - 1) / copies + on_all)


def test_gathered_weights_are_gone_with_their_block_whether_it_is_computed_again_or_not() -> None:
    rule = Lora(16, 32.0, ("*_proj.weight",))
    steps = [step_of("llama-3-8b", parts_and_copies(8), remat=remat, lora=rule) for remat in (False, True)]
    block = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    # two blocks at a time; every rank has the deltas whole, and sums their gradients once
    deltas = tree.n_bytes(steps[0].trainable)
    alone = peak_memory(step_of("llama-3-8b", ALONE, remat=True, lora=rule))
    for step in steps:
        assert 2 * block <= peak_memory(step)["gathered"] < 6 * block
        assert peak_memory(step)["trained"] == alone["trained"]
        assert traffic(step).gathered == pytest.approx(2 * 32 * block * 7 / 8 + 2 * 128256 * 4096 * 2 * 7 / 8)
        assert traffic(step).scattered == 0
        assert traffic(step).summed == pytest.approx(2 * deltas * 7 / 8)


def test_the_time_of_a_step_is_that_of_its_slowest_resource() -> None:
    """8 ranks in a node hide what they send behind the products of 4,096 tokens; copies between nodes add their sum."""
    h100, rule = open_device("h100"), Lora(16, 32.0, ("*_proj.weight",))
    step = step_of("llama-3-70b", parts_and_copies(8), remat=True, lora=rule)
    flops = 6e11
    found = timing(step, flops, {"activations": 0, "optimizer": 0}, h100)
    assert found.products_s == pytest.approx(flops * N_TOKENS / 989.4e12)
    assert found.overlapped_s == pytest.approx((found.sent.gathered + found.sent.scattered) / 450e9)
    assert (found.binds, found.hides_overlapped) == ("products", True)
    assert found.expected_s == pytest.approx(found.products_s / 0.4 + found.exposed_s)
    across = timing(step_of("llama-3-70b", parts_and_copies(64), remat=True, lora=rule), flops / 64, {"activations": 0}, h100)
    assert (across.binds, across.hides_overlapped) == ("links", False)
    assert across.roof_s == pytest.approx(across.overlapped_s + across.exposed_s)
    slow = timing(step, flops / 1e6, {"activations": 10**13}, h100)
    assert slow.binds == "memory"


def test_ranks_that_share_tokens_have_a_part_of_the_activations_and_exchange_heads() -> None:
    """32k tokens of an 8B on 8 ranks: the memory of 4k on a rank, but for what attention does with all of its heads' tokens."""
    rule, n_tokens, c = Lora(16, 32.0, ("*_proj.weight",)), 8 * N_TOKENS, 8
    shared = step_of("llama-3-8b", mesh_under({"data": 2, "context": c}, "cp"), remat=True, lora=rule)._replace(n_tokens=n_tokens)
    short = step_of("llama-3-8b", parts_and_copies(16), remat=True, lora=rule)._replace(n_tokens=n_tokens // c)
    parts, of_short = peak_memory(shared), peak_memory(short)
    for name in ("weights", "trained", "optimizer", "activations", "gathered"):
        assert parts[name] == pytest.approx(of_short[name], rel=0.001)
    # 32 heads of queries and of results, 8 of keys and of values, in 2 bytes; forward, again, and backward; losses once each
    of_block = n_tokens // c * 128 * (2 * 32 + 2 * 8) * 2 * (c - 1) / c
    assert traffic(shared).exchanged == pytest.approx(3 * 32 * of_block + 2 * 4 * n_tokens // c * (c - 1))
    # parts are gathered along both axes, as much in all as along one of as many ranks
    assert traffic(shared).gathered == pytest.approx(traffic(short).gathered)
    h100, flops = open_device("h100"), 1e11
    found = timing(shared, flops, parts, h100)
    assert found.products_s == pytest.approx(flops * n_tokens / c / 989.4e12)
    assert found.exchanged_s == pytest.approx(found.sent.exchanged / 450e9)
    # the two parts along data stand in two nodes: one network card for each rank
    along_data = [one for one in transfers(shared) if one.purpose == "gathered" and one.group == RankGroup(2, c)]
    along_context = traffic(shared).gathered - sum(one.n_bytes for one in along_data)
    assert found.overlapped_s == pytest.approx(sum(one.n_bytes for one in along_data) / 50e9 + along_context / 450e9)
    beside = max(found.products_s / 0.4, found.overlapped_s)
    assert found.expected_s == pytest.approx(beside + found.exposed_s + found.exchanged_s)


def test_ranks_of_the_axis_tensor_compute_with_their_part_of_a_block() -> None:
    """A 70B on 64 ranks, whose nodes share rows of 8 times as many tokens."""
    d, s, n = 8, 8, 64
    step = step_of("llama-3-70b", mesh_under({"data": d, "tensor": s}, "tp_fsdp"), remat=True)._replace(n_tokens=s * N_TOKENS)
    parts, sent = peak_memory(step), traffic(step)
    n_vectors, outside = 161 * 8192, 2 * 128256 * 8192
    block = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672
    matrices = 80 * block + outside
    assert parts["trained"] == 4 * (matrices // n + n_vectors)
    # of a block a rank gathers its part along data, and of the head all
    assert parts["gathered"] in (2 * 2 * block // s, outside)
    assert sent.gathered == pytest.approx(2 * 2 * 80 * block / n * (d - 1) + 2 * outside * (n - 1) / n)
    assert sent.scattered == pytest.approx(4 * 80 * block / n * (d - 1) + 4 * outside * (n - 1) / n)
    assert sent.summed == pytest.approx(2 * 4 * n_vectors * (n - 1) / n)
    # two gathers and two scatters of all tokens in a block, in three passes; losses of tokens and their gradients
    assert sent.exchanged == pytest.approx(3 * 80 * 4 * N_TOKENS * 8192 * 2 * (s - 1) + 2 * 4 * N_TOKENS * (s - 1))
    assert parts["activations"] == (80 + 1) * N_TOKENS * 8192 * 2  # inputs of the blocks and of the last norm
    h100, flops = open_device("h100"), 1e11
    found = timing(step, flops, parts, h100)
    assert found.products_s == pytest.approx(flops * N_TOKENS / 989.4e12)
    assert found.exchanged_s == pytest.approx(sent.exchanged / 450e9)


def test_ranks_of_the_axis_expert_compute_with_their_experts_alone() -> None:
    """Four layers of a 235B on 64 ranks: of its experts each has an eighth in a block, and rows travel."""
    n_layers, d, e, n, lora = 4, 8, 8, 64, Lora(16, 32.0, ("*.self_attn.*_proj.weight",))
    large = shape("qwen3-235b-a22b")
    model = large._replace(config=msgspec.structs.replace(large.config, n_layers=n_layers))
    step = step_with(model, mesh_under({"data": d, "expert": e}, "ep"), remat=True, lora=lora)
    parts, sent = peak_memory(step), traffic(step)
    experts, attention = 128 * 3 * 4096 * 1536, 4096 * 128 * (2 * 64 + 2 * 4)
    router, outside = 128 * 4096, 2 * 151936 * 4096
    # the router is cut along experts alone
    in_matrices = (n_layers * (experts + attention) + outside) // n + n_layers * router // e
    in_vectors = n_layers * (2 * 4096 + 2 * 128) + 4096
    assert parts["weights"] == 2 * (in_matrices + in_vectors)
    of_block = 2 * (experts // e + attention + router)
    assert parts["gathered"] in (2 * of_block, outside)
    # to owners, 7/8 of a part of each expert; whole experts from the eight ranks along data; everything else from all
    of_experts = 2 * experts / n * ((e - 1) / e + (d - 1))
    of_others = 2 * (attention * (n - 1) / n + router * (e - 1) / e)
    assert sent.gathered == pytest.approx(2 * n_layers * (of_experts + of_others) + 2 * outside * (n - 1) / n)
    assert sent.scattered == 0
    # 8 rows of a token there and back, in the forward, again, and in the backward
    assert sent.exchanged == pytest.approx(3 * n_layers * 2 * N_TOKENS * 8 * 4096 * 2 * (e - 1) / e)
