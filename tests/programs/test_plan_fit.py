"""Advice of a plan where a step does not fit."""

from pathlib import Path

import msgspec
import pytest

from minitune.planning.devices import open_device
from minitune.planning.mesh import Mesh, mesh_under
from minitune.programs import program
from minitune.programs.plan import Planned, PlanTarget, planned
from minitune.programs.plan_fit import Fit, fit
from minitune.programs.plan_rows import step_tokens
from minitune.programs.plan_time import planned_time
from support.programs import LORA, NF4, SHAPE_HEAD, TRAIN

H100 = open_device("h100")
FULL = '[[stage]]\nop = "full"\n'
SMALL = "micro_batch_size = 1\nremat = true\n"


def plan_of(folder: Path, stages: str, n_devices: int, n_bytes: int = H100.memory_bytes) -> tuple[Planned, Fit]:
    """Plan of a step on so many devices of so many bytes, and its fit."""
    (folder / "p.toml").write_text(SHAPE_HEAD.format(model="configs/models/llama-125m.toml") + stages, encoding="utf-8")
    mesh = mesh_under({"data": n_devices}, "fsdp") if n_devices > 1 else Mesh()
    target = PlanTarget(msgspec.structs.replace(H100, memory_bytes=n_bytes), mesh)
    (one,) = planned(program.load(folder / "p.toml"), target=target)
    return one, fit(one, target)


def test_the_fewest_devices_that_hold_a_step_are_the_last_advice(tmp_path: Path) -> None:
    n_bytes = plan_of(tmp_path, FULL + TRAIN + SMALL, 8)[0].n_bytes
    _, found = plan_of(tmp_path, FULL + TRAIN, 1, n_bytes)
    on_eight = f" on 8 devices under fsdp (a batch has rows for 4 of them): {n_bytes / 2**20:,.1f} MiB, fits"
    assert found.lines[-1].endswith(on_eight)
    assert found.toml[-2:] == ['plan = "fsdp"', "mesh = { data = 8 }"]
    _, again = plan_of(tmp_path, "".join([FULL, TRAIN, *(f"{line}\n" for line in found.toml[1:3])]), 8, n_bytes)
    assert again.fits
    assert any("adamw8bit" in line for line in found.lines)
    _, found = plan_of(tmp_path, FULL + TRAIN, 1, n_bytes // 100)
    assert found.lines[-1] == "  or a smaller model, or a lora stage in place of a full one"


def test_ranks_that_hold_parts_are_not_advised_what_they_refuse(tmp_path: Path) -> None:
    """8-bit moments belong to blocks of whole weights, and a base off the device to one process."""
    for stages in (FULL, LORA):
        one, _ = plan_of(tmp_path, stages + TRAIN, 2)
        _, found = plan_of(tmp_path, stages + TRAIN, 2, one.n_bytes // 100)
        assert len(found.lines) > 2
        assert not any("adamw8bit" in line or "offload" in line for line in found.lines)


@pytest.mark.parametrize("kind", ["adamw8bit", "muon"])
def test_an_optimizer_of_whole_weights_is_not_advised_to_go_to_parts(kind: str, tmp_path: Path) -> None:
    stages = FULL + TRAIN.replace("adamw", kind)
    one, _ = plan_of(tmp_path, stages, 1)
    _, found = plan_of(tmp_path, stages, 1, one.n_bytes // 8)
    assert found.lines[-1].startswith("  or a smaller model")
    assert not any("fsdp" in line for line in found.lines)


def test_weights_that_are_quantized_are_not_advised_to_be(tmp_path: Path) -> None:
    stages = NF4 + LORA + TRAIN
    one, _ = plan_of(tmp_path, stages, 1)
    _, found = plan_of(tmp_path, stages, 1, one.n_bytes // 100)
    assert any("model.offload=host" in line for line in found.lines)
    assert not any("quantize" in line for line in found.lines)


def test_a_batch_has_no_more_tokens_than_its_rows(tmp_path: Path) -> None:
    for n in (1, 2, 3, 64):
        one, _ = plan_of(tmp_path, FULL + TRAIN, n)
        assert step_tokens(one) == 4 * 512
        time = planned_time(one, H100)
        assert time.tokens == 4 * 512
        assert time.step.expected_s >= time.step.roof_s
