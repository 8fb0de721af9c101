"""Plans of models whose frozen blocks are kept off the device, beside closed forms."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from minitune import tree
from minitune.__main__ import main
from minitune.planning import calibration
from minitune.planning.calibration import read_rate
from minitune.planning.devices import open_device
from minitune.planning.mesh import mesh_under
from minitune.programs import program
from minitune.programs.plan import Planned, PlanTarget, planned
from minitune.programs.plan_fit import fit
from minitune.programs.plan_time import planned_time
from support.programs import LORA, NF4, SHAPE_HEAD, TRAIN

H100 = PlanTarget(open_device("h100"))


def plan_of(folder: Path, stages: str, *words: str, target: PlanTarget = H100) -> Planned:
    (folder / "p.toml").write_text(SHAPE_HEAD.format(model="configs/models/llama-125m.toml") + stages, encoding="utf-8")
    (one,) = planned(program.load(folder / "p.toml", words), target=target)
    return one


def by_layer(one: Planned) -> list[int]:
    """Bytes of the matrices of each layer of a step."""
    found: dict[str, int] = {}
    for name, w in one.step.params.items():
        if ".layers." in name and len(w.shape) > 1:
            found[name.split(".")[2]] = found.get(name.split(".")[2], 0) + tree.n_bytes(w)
    return [*found.values()]


@pytest.mark.parametrize("before", ["", NF4])
def test_a_plan_leaves_out_the_blocks_but_two_and_counts_two_copies_of_each(tmp_path: Path, before: str) -> None:
    stages = before + LORA + TRAIN + "micro_batch_size = 2\nremat = true\n"
    here, away = plan_of(tmp_path, stages), plan_of(tmp_path, stages, "model.offload=host")
    blocks = by_layer(here)
    assert here.parts["weights"] - away.parts["weights"] == sum(blocks)
    assert away.parts["gathered"] == 2 * max(blocks)
    assert {**here.parts, "weights": 0, "gathered": 0} == {**away.parts, "weights": 0, "gathered": 0}
    time = planned_time(away, H100.device).step
    assert time.fetched == 2 * 2 * sum(blocks)  # forward and backward of two micro-batches
    assert time.fetched_s == pytest.approx(time.fetched / 64e9)
    assert planned_time(here, H100.device).step.fetched == 0
    # what does not hide makes the step as long as itself
    slow = msgspec.structs.replace(H100.device, host_bytes_per_s=1e9)
    slowed = planned_time(away, slow)
    assert slowed.step.expected_s == slowed.step.roof_s == pytest.approx(time.fetched / 1e9)
    assert slowed.step.binds == "copies"
    assert any(
        "of frozen blocks come to the device" in line and "longer than the products" in line for line in slowed.lines("train")
    )
    fast = planned_time(away, msgspec.structs.replace(H100.device, host_bytes_per_s=1e15))
    assert fast.step.expected_s == planned_time(here, H100.device).step.expected_s
    assert any("behind the products" in line for line in fast.lines("train"))


def test_the_rate_of_the_disk_is_measured_and_unknown_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = LORA + TRAIN
    device = msgspec.structs.replace(H100.device, kind="cpu")
    one = plan_of(tmp_path, stages, target=PlanTarget(device))
    away = one._replace(step=one.step._replace(blocks="disk"))
    assert planned_time(away, device).step.fetched_s is None
    assert any("in how long is not known" in line for line in planned_time(away, device).lines("train"))
    known = msgspec.structs.replace(device, disk_bytes_per_s=2e9)
    assert planned_time(away, known).step.fetched_s == pytest.approx(planned_time(away, known).step.fetched / 2e9)
    (tmp_path / "f").write_bytes(bytes(3_000_017))
    monkeypatch.setattr(calibration, "READ_BYTES", 999_983)
    times = iter([5.0, 7.0])
    assert read_rate(tmp_path / "f", lambda: next(times)) == 3_000_017 / 2
    monkeypatch.setattr(calibration, "COPIED_BYTES", 1_500_000)
    times = iter([5.0, 7.0])
    assert read_rate(tmp_path / "f", lambda: next(times)) == 2 * 999_983 / 2


def test_on_a_cpu_the_host_is_where_weights_are(tmp_path: Path) -> None:
    target = PlanTarget(msgspec.structs.replace(H100.device, kind="cpu"))
    plans = [plan_of(tmp_path, LORA + TRAIN, *words, target=target) for words in ((), ("model.offload=host",))]
    assert plans[0].parts == plans[1].parts


@pytest.mark.soak
def test_it_is_the_last_change_that_makes_a_step_fit(tmp_path: Path) -> None:
    small = ["train.micro_batch_size=1", "train.remat=true"]
    codes, away = (plan_of(tmp_path, NF4 + LORA + TRAIN, *small, *words) for words in ((), ("model.offload=host",)))
    memory = (codes.n_bytes + away.n_bytes) // 2
    target = PlanTarget(msgspec.structs.replace(H100.device, memory_bytes=memory))
    found = fit(plan_of(tmp_path, LORA + TRAIN, target=target), target)
    assert found.lines[-1].startswith("  and model.offload=host: ")
    assert found.lines[-1].endswith(", fits")
    assert found.toml[-2:] == ["# in [model]", 'offload = "host"']


def test_parts_of_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"offload is given with plan = {'vocab': 'data', .*}, .*expected plan = \"dp\""):
        plan_of(tmp_path, LORA + TRAIN, "model.offload=host", target=H100._replace(mesh=mesh_under({"data": 8}, "fsdp")))


@pytest.mark.soak
def test_a_measured_machine_knows_its_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = SHAPE_HEAD.replace('config = "{model}"', f'path = "{tiny / "model"}"').replace('"bfloat16"', '"float32"')
    (tmp_path / "p.toml").write_text(text.replace("512", "256") + LORA + TRAIN, encoding="utf-8")
    words: Any = [str(tmp_path / "p.toml"), "model.offload=disk", "--measure"]
    assert main(["plan", *words]) == 0
    (machine,) = (tmp_path / "cache").rglob("machines/*.toml")
    assert "disk_bytes_per_s" in machine.read_text(encoding="utf-8")
    assert "host_bytes_per_s" not in machine.read_text(encoding="utf-8")
