"""What several processes can't run, or not on weights that they share, is refused before anything starts."""

import socket
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import torch.distributed as dist

from minitune import hardware
from minitune.__main__ import main
from minitune.errors import InputError
from minitune.launch.ranks import Launched
from minitune.models.families import llama
from minitune.models.model import Model
from minitune.planning.mesh import Mesh, mesh_under
from minitune.programs import plan_fit, program, run_ranks
from minitune.programs.plan import first_state
from minitune.programs.plan_fit import check_memory
from minitune.programs.run_ranks import _take_device, planned_mesh, ranks_of_launch, stages_on_ranks
from minitune.programs.sharding import sharding_of
from minitune.programs.shared_weights import check_shared_weights
from minitune.programs.stages.base import BaseStage
from minitune.sharding.ranks import ALONE, Ranks
from support.programs import LORA, TINY, TRAIN, small_program

pytestmark = pytest.mark.fast

TWO, MODEL = Ranks(0, 2), Model(llama.FAMILY, TINY)
QAT = '[[stage]]\nop = "full"\n[[stage]]\nop = "qat"\nscheme = { kind = "int8" }\n'
GPTQ = '[[stage]]\nop = "quantize"\nscheme = { kind = "int4" }\nmethod = { kind = "gptq", data = "train", rows = 2 }\n'
QUANTIZE = '[[stage]]\nop = "quantize"\nscheme = {{ kind = "{scheme}" }}\n'
SWEEP = f'{TRAIN}sweep = {{ "optimizer.lr" = [0.1, 0.2] }}\nevaluate = {{ data = "train", every = 2 }}\n'
IMPORTANT = '[[stage]]\nop = "export"\nformat = "gguf"\nimportance = { data = "train", rows = 2 }\n'
PRIVATE = f"{TRAIN}privacy = {{ max_norm = 1.0, noise = 1.0, delta = 1e-5 }}\n"


def loaded(folder: Path, stages: str, *words: str) -> program.Program:
    head = small_program().partition("[[stage]]")[0]
    (folder / "p.toml").write_text(head + stages, encoding="utf-8")
    return program.load(folder / "p.toml", words)


class Whole(BaseStage, frozen=True, kw_only=True, tag="whole"):
    """A stage that says nothing of parts."""


def test_a_stage_that_does_not_work_on_parts_is_refused_under_a_plan(tmp_path: Path) -> None:
    cut, whole = loaded(tmp_path, LORA, "plan=fsdp"), loaded(tmp_path, LORA)
    with pytest.raises(
        InputError, match=r"stages: whole needs the whole model on every rank, .* expected plan = \"dp\" .* after a save"
    ):
        stages_on_ranks(msgspec.structs.replace(cut, stage=(Whole(),)), TWO)
    assert stages_on_ranks(msgspec.structs.replace(whole, stage=(Whole(),)), TWO)


@pytest.mark.parametrize("words", [(), ("plan=fsdp",)], ids=str)
def test_ranks_may_run_every_stage_but_a_private_one(words: tuple[str, ...], tmp_path: Path) -> None:
    for stages in (QAT, GPTQ, IMPORTANT, LORA + SWEEP):
        assert stages_on_ranks(loaded(tmp_path, stages, *words), TWO)
    with pytest.raises(InputError, match=r"stages: train has privacy and the run 2 processes, expected one"):
        stages_on_ranks(loaded(tmp_path, LORA + PRIVATE, *words), TWO)
    assert stages_on_ranks(loaded(tmp_path, LORA + PRIVATE, *words), ALONE)


@pytest.mark.parametrize(
    ("batch", "micro", "n_ranks", "expected"),
    [(8, None, 2, 4), (8, 2, 2, 2), (8, 8, 3, 3), (1, None, 4, 1), (5, 4, 1, 4)],
)
def test_each_rank_has_a_micro_batch(batch: int, micro: int | None, n_ranks: int, expected: int, tmp_path: Path) -> None:
    words = [f"train.batch_size={batch}", *([f"train.micro_batch_size={micro}"] if micro else [])]
    *_, stage = stages_on_ranks(loaded(tmp_path, LORA + TRAIN, *words), Ranks(0, n_ranks))
    assert stage.micro_batch_size == (micro if n_ranks == 1 else expected)


@pytest.mark.parametrize(
    ("plan", "mesh", "message"),
    [
        ("fdsp", {}, r"sharding: there is no plan 'fdsp', expected one of .*; did you mean 'fsdp'"),
        ({"d_f": "data"}, {}, r"sharding: the plan cuts 'd_f', which no matrix of this model has.*did you mean 'd_ff'"),
        (
            "fsdp",
            {"replica": 2},
            r"sharding: the plan puts .* on axis 'data', expected .*: replica; write mesh = { replica = 2, data = N }",
        ),
        ("dp", {"data": 1, "expert": 2}, r"the mesh has the axis 'expert', along which the plan cuts no experts"),
        (
            "dp",
            {"context": 3},
            r"axis context has 3 ranks, among which 2 heads of queries are dealt out, expected one of 1, 2; put",
        ),
        ("dp", {"contxt": 2}, r"the axis 'contxt', along which the plan cuts nothing, expected .*; did you mean 'context'"),
        ("cp", {"context": 2, "data": 1}, r"sharding: the mesh has the axes context, data, expected context last"),
    ],
)
def test_a_plan_that_fits_neither_model_nor_mesh_is_refused(plan: str, mesh: dict[str, int], message: str) -> None:
    for ranks in (TWO, ALONE):
        with pytest.raises(InputError, match=message):
            sharding_of(plan, mesh, ranks, MODEL, "cpu")


def test_a_plan_that_needs_another_axis_names_a_mesh_that_has_it() -> None:
    for plan, axis in (("tp_fsdp", "tensor"), ("cp", "context"), ("ep", "expert")):
        for ranks, n in ((TWO, "2"), (ALONE, "N")):
            with pytest.raises(InputError, match=f"write mesh = {{ data = 1, {axis} = {n} }}"):
                sharding_of(plan, {}, ranks, MODEL, "cpu")


def test_codes_that_ranks_cannot_share_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    mesh = {"data": 1, "tensor": 2}
    for scheme, message in (("nf4", r"is of nf4, whose scales the 2 ranks of the axis tensor can't share"), ("int8", None)):
        program = loaded(tmp_path, QUANTIZE.format(scheme=scheme) + LORA + TRAIN)
        first = first_state(program)
        check_shared_weights(program, first, mesh_under({"data": 2}, "fsdp"))
        if message is None:
            check_shared_weights(program, first, mesh_under(mesh, "tp_fsdp"))
            continue
        with pytest.raises(InputError, match=message):
            check_shared_weights(program, first, mesh_under(mesh, "tp_fsdp"))


def test_an_optimizer_that_wants_whole_weights_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    full = loaded(tmp_path, '[[stage]]\nop = "full"\n' + TRAIN.replace("adamw", "adamw8bit"))
    adapted = loaded(tmp_path, LORA + TRAIN.replace("adamw", "adamw8bit"))
    for mesh in (mesh_under({"data": 1}, "fsdp"), mesh_under({"data": 2}, "dp")):
        check_shared_weights(full, first_state(full), mesh)
    # deltas are whole on every rank
    check_shared_weights(adapted, first_state(adapted), mesh_under({"data": 2}, "fsdp"))
    with pytest.raises(InputError, match=r"optim: AdamW8bit updates model\..*, of which each rank holds a part, expected"):
        check_shared_weights(full, first_state(full), mesh_under({"data": 2}, "fsdp"))


def test_a_mesh_of_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    for plan, mesh in (("dp", {"context": 4}), ("dp", {"data": 8}), ("fsdp", {"data": 3})):
        small = MODEL._replace(config=msgspec.structs.replace(TINY, n_heads=4, n_kv_heads=4))
        with pytest.raises(InputError, match=r"the mesh has \d ranks \(.*\), expected the 2 that were started"):
            sharding_of(plan, mesh, TWO, small, "cpu")
    assert stages_on_ranks(loaded(tmp_path, LORA + TRAIN, "mesh={context=4}"), TWO)


def test_a_single_process_and_dp_share_nothing() -> None:
    assert sharding_of("fsdp", {"data": 8}, ALONE, MODEL, "cpu") is None
    assert sharding_of("dp", {}, TWO, MODEL, "cpu") is None


@pytest.mark.parametrize(
    ("words", "n_ranks", "mesh"),
    [
        (["plan=fsdp"], 1, Mesh()),
        ([], 4, Mesh({"data": 4})),
        (["plan=fsdp"], 4, mesh_under({"data": 4}, "fsdp")),
        (["plan=hsdp", "mesh={replica=2,data=4}"], 8, mesh_under({"replica": 2, "data": 4}, "hsdp")),
        (["plan=cp", "mesh={data=2,context=4}"], 8, mesh_under({"data": 2, "context": 4}, "cp")),
        (["mesh={context=2}"], 2, Mesh({"context": 2})),
        (['plan={d_ff="data"}'], 4, Mesh({"data": 4}, {"d_ff": "data"})),
    ],
)
def test_memory_is_planned_for_the_ranks_of_the_run(words: list[str], n_ranks: int, mesh: Mesh, tmp_path: Path) -> None:
    assert planned_mesh(loaded(tmp_path, LORA + TRAIN, *words), Ranks(0, n_ranks)) == mesh


def test_a_model_that_is_cut_takes_less_of_a_rank(tmp_path: Path) -> None:
    words = ['model={ config = "configs/models/llama-125m.toml", tokenizer = "demo", device = "cpu", dtype = "float32" }']
    full = loaded(tmp_path, '[[stage]]\nop = "full"\n' + TRAIN, *words)
    meshes = Mesh({"data": 2}), mesh_under({"data": 2}, "fsdp")
    whole, cut = (check_memory(full, first_state(full), mesh)["train"] for mesh in meshes)
    assert cut.n_bytes < 0.7 * whole.n_bytes


@pytest.mark.parametrize(
    ("words", "n_ranks"),
    [
        (["plan=cp", "mesh={data=1,context=2}"], 2),
        (['plan={d_ff="data",heads="data"}'], 2),
        (['plan={d_ff="shelf"}', "mesh={data=2,shelf=3}"], 6),
    ],
)
def test_a_run_on_any_mesh_is_planned_and_refused_where_it_can_not_fit(
    words: list[str], n_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = 'model={ config = "configs/models/llama-125m.toml", tokenizer = "demo", device = "cpu", dtype = "float32" }'
    full = loaded(tmp_path, '[[stage]]\nop = "full"\n' + TRAIN, model, *words)
    first, mesh = first_state(full), planned_mesh(full, Ranks(0, n_ranks))
    one, alone = (check_memory(full, first, mesh)["train"] for mesh in (mesh, Mesh({"data": n_ranks})))
    assert one.n_bytes < alone.n_bytes
    of_process = one.process_bytes
    there = of_process + (one.n_bytes + alone.n_bytes) // 2
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: there)
    assert check_memory(full, first, mesh)["train"].n_bytes == one.n_bytes
    monkeypatch.setattr(plan_fit, "memory_bytes", lambda *_: of_process + one.n_bytes - 1)
    with pytest.raises(InputError, match=r"plan: train needs [\d,]+ MiB, expected at most the [\d,]+ MiB that are there"):
        check_memory(full, first, mesh)


def test_check_looks_at_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "lora", "plan=fdsp"]) == 2
    assert "there is no plan 'fdsp'" in capsys.readouterr().err
    assert main(["check", "lora", "plan=fsdp"]) == 0


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitune.hardware.accelerator", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="local rank 1 on a node with 1 GPUs, expected one for each process"), ranks_of_launch():
        pass
    monkeypatch.setattr("minitune.hardware.accelerator", lambda: "mps")
    with pytest.raises(InputError, match="2 processes on a device of type mps, expected cpu or cuda"), ranks_of_launch():
        pass


def test_a_task_of_srun_takes_the_only_gpu_that_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --gpus-per-task 1 each sees its own as the first, whatever its number on the node."""
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    _take_device(Launched(3, 8, 3, gpus_per_task=1), "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    _take_device(Launched(3, 8, 3), "cuda")
    assert taken == [0, 3]


def test_a_port_that_another_process_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = alone_of_three(monkeypatch, taken.getsockname()[1], rank=0)
        with pytest.raises(InputError, match=rf"MASTER_PORT {place.port}: another process has that port"), ranks_of_launch():
            pass


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, r"rank 0 has not met all 3 ranks at MASTER_ADDR 127.0.0.1 and"), (1, r"rank 1 of 3 can't reach MASTER_ADDR")],
)
def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, rank: int, message: str) -> None:
    monkeypatch.setattr(run_ranks, "MEETING", timedelta(seconds=0.2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone_of_three(monkeypatch, port, rank)
    with pytest.raises(InputError, match=message), ranks_of_launch():
        pass


def test_one_rank_of_several_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    for key in ("a", "b"):
        store.set(key, "yes")
    place = Launched(1, 3, 1, "node7", 29500)
    said = run_ranks._not_met(place, store, ["a", "b", "c"], TimeoutError())
    assert "within 15 minutes rank 1 has not met rank 2 of 3 at MASTER_ADDR node7 and MASTER_PORT 29500" in said


def test_where_the_first_rank_has_gone_it_is_the_one_that_is_named() -> None:
    """It keeps the store, which then can't say who has come."""
    server = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, 3, is_master=False, wait_for_workers=False)
    del server
    said = run_ranks._not_met(Launched(1, 3, 1, "node7", 29500), client, ["a", "b"], TimeoutError())
    assert "rank 1 has not met rank 0 of 3" in said


def alone_of_three(monkeypatch: pytest.MonkeyPatch, port: int, rank: int) -> Launched:
    """Place of this process as a launcher sets it, where the two other ranks are not started."""
    place = Launched(rank, 3, rank, "127.0.0.1", port)
    for name, value in place.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    return place
