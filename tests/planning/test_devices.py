"""Devices and meshes that a plan is made for: figures that hang together, and sentences for what is wrong."""

from pathlib import Path

import pytest
import torch

from minitune.errors import InputError
from minitune.planning.devices import Device, names, open_device
from minitune.planning.mesh import Mesh, mesh_of
from minitune.planning.traffic import replica_link, shard_link
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
    assert mesh_of("data=8,replica=16") == Mesh(8, 16)
    assert mesh_of("data=8") == Mesh(8, 1)
    assert mesh_of("data=8, replica=2", "dp") == Mesh(1, 16)
    assert mesh_of("data=8,replica=2", "fsdp") == Mesh(16, 1)
    for written in ("data=0", "data=8,data=2", "model=4", "data", ""):
        with pytest.raises(InputError, match=r"plan: the mesh .* expected axes once each as in data=8,replica=16"):
            mesh_of(written)
    with pytest.raises(InputError, match=r"plan: 'tp' is no plan, expected one of dp, fsdp, hsdp"):
        mesh_of("data=8", "tp")
    with pytest.raises(InputError, match=r"plan: hsdp on the mesh data=8 has one axis, expected two"):
        mesh_of("data=8", "hsdp")


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
    assert shard_link(Mesh(8, 4), device) == 450e9
    assert shard_link(Mesh(64, 1), device) == 400e9  # eight rings, each through a card of its own
    assert replica_link(Mesh(2, 4), device) == 450e9
    assert replica_link(Mesh(8, 4), device) == 50e9  # one rank of each group in a node
    assert replica_link(Mesh(1, 64), device) == 400e9
    assert replica_link(Mesh(4, 8), device) == 100e9
