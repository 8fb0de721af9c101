"""Devices and meshes that a plan is made for: figures that hang together, and sentences for what is wrong."""

from pathlib import Path

import pytest
import torch

from minitune import models
from minitune.errors import InputError
from minitune.planning.devices import Device, names, open_device
from minitune.planning.mesh import Mesh, axes_of, mesh_under
from minitune.planning.traffic import RankGroup, Transfer, axis_group, link, sending_rate
from minitune.sharding.plans import named_plan
from support.paths import ROOT


@pytest.mark.parametrize("name", names())
def test_a_device_is_one_that_could_exist(name: str) -> None:
    """A rate that was stated with sparsity, or a bandwidth in bits, would stand out against the others."""
    device = open_device(name)
    assert device.rate(torch.bfloat16) == device.rate(torch.float16)
    assert 2 <= device.rate(torch.bfloat16) / device.rate(torch.float32) <= 16
    assert device.flops_per_s.get("float8", 2 * device.rate(torch.bfloat16)) == pytest.approx(
        2 * device.rate(torch.bfloat16), rel=0.02
    )
    # products of a card of the last years need 100 to 450 of them for every byte that it reads
    assert 100 <= device.rate(torch.bfloat16) / device.memory_bytes_per_s <= 450
    assert device.memory_bytes_per_s > device.link_bytes_per_s > device.node_bytes_per_s
    assert 10e9 < device.memory_bytes < 300e9
    assert device.rate(torch.float64) == device.rate(torch.float32)


def test_an_unknown_device_and_a_faulty_file_end_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the device h10 is not known, expected one of a100-80, h100.*; did you mean 'h100'"):
        open_device("h10")
    file = tmp_path / "mine.toml"
    text = (ROOT / "configs/devices/h100.toml").read_text(encoding="utf-8")
    file.write_text(text.replace("n_per_node       = 8", "n_per_node = 0"), encoding="utf-8")
    with pytest.raises(InputError, match=r"plan: .*mine.toml.*n_per_node"):
        open_device(str(file))
    file.write_text(text.replace(", float32 = 66.9e12", ""), encoding="utf-8")
    with pytest.raises(InputError, match=r"flops_per_s has no float32, expected the rate of float32 products"):
        open_device(str(file))


def test_a_mesh_is_read_under_its_plan() -> None:
    assert axes_of("replica=16, data=8") == {"replica": 16, "data": 8}
    assert [*axes_of("data=2,context=4")] == ["data", "context"]
    for written in ("data=0", "data=8,data=2", "data", "", "Data=2"):
        with pytest.raises(InputError, match=r"plan: the mesh .* expected axes once each as in replica=16,data=8"):
            axes_of(written)
    # the plans and the axes are those of a run
    assert mesh_under({"replica": 2, "data": 8}, "hsdp").plan == named_plan("hsdp")
    assert mesh_under({"data": 8}, "dp").plan == {}
    assert mesh_under({"shelf": 8}, {"d_ff": "shelf"}).axes == {"shelf": 8}
    with pytest.raises(InputError, match=r"there is no plan 'zero', expected one of cp, dp, ep, fsdp, hsdp, tp_fsdp"):
        mesh_under({"data": 8}, "zero")
    with pytest.raises(InputError, match=r"the mesh has the axis 'model', along which the plan cuts nothing"):
        mesh_under({"model": 4}, "fsdp")


def test_a_mesh_that_does_not_fit_the_model_is_refused() -> None:
    config = models.open_config(ROOT / "configs/models/llama-125m.toml").config
    for axes, plan, message in (
        ({"data": 2, "context": 5}, "cp", "the axis context has 5 ranks, among which 12 heads"),
        ({"context": 2, "data": 2}, "cp", "expected context last"),
        ({"replica": 4}, "fsdp", "axis 'data', expected an axis of the mesh"),
        ({"data": 1, "expert": 2}, "dp", "the axis 'expert', along which the plan cuts no experts"),
        ({"data": 4}, {"d_f": "data"}, "the plan cuts 'd_f', which no matrix of this model has"),
    ):
        with pytest.raises(InputError, match=message):
            mesh_under(axes, plan).for_model(config)
    assert Mesh({}, {"d_f": "data"}).for_model(config).cuts == {}  # one rank holds everything


def test_ranks_in_one_node_send_over_its_links_and_others_over_as_many_network_cards_as_stand_there() -> None:
    device = Device(
        kind="cuda",
        memory_bytes=10**10,
        memory_bytes_per_s=1e12,
        flops_per_s={"float32": 1e12},
        link_bytes_per_s=450e9,
        node_bytes_per_s=50e9,
        n_per_node=8,
        attained=0.5,
    )

    def rates(**axes: int) -> list[float]:
        return [link(axis_group(Mesh(axes), axis), device) for axis in axes]

    assert rates(replica=4, data=8) == [50e9, 450e9]  # one rank of each group in a node
    assert rates(data=64) == [400e9]  # eight rings, each through a card of its own
    assert rates(replica=4, data=2) == [450e9, 450e9]
    assert rates(replica=8, data=4) == [100e9, 450e9]
    assert rates(replica=2, data=2, context=4) == [50e9, 450e9, 450e9]
    assert link(RankGroup(64), device) == 400e9
    # what each gets is its own: of 15 others 8 stand in another node, behind one card
    of_ring, to_each = (Transfer("exchanged", RankGroup(16), 1.0, one) for one in (False, True))
    assert (sending_rate(of_ring, device), sending_rate(to_each, device)) == (400e9, 50e9 * 15 / 8)
    assert sending_rate(to_each._replace(group=RankGroup(8)), device) == 450e9
