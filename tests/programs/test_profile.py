"""Profiles: the table is a function of the trace, and recording changes nothing of what is trained."""

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import hardware
from minitune.errors import InputError
from minitune.programs.page.page import page
from minitune.programs.page.run_files import read_run
from minitune.programs.profiling import kinds, recording
from minitune.programs.profiling.table import TITLES, KindOfWork, StageProfile, drawn_table, read_profiles, stage_profile
from minitune.programs.profiling.trace import Work, decode, measure
from minitune.programs.stages import loop_state
from minitune.programs.stages.due import Due, n_waiting
from support.programs import LORA, TRAIN, evaluation, rows_without_time, run, run_killed, start, weights

STEPS = {"ph": "X", "cat": "user_annotation", "name": kinds.STEPS, "tid": 1, "ts": 0.0, "dur": 100.0}


def span(name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op", external_id: int | None = None) -> dict:
    args = {} if external_id is None else {"External id": external_id}
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "pid": 9, "ts": ts, "dur": dur, "args": args}


def memory(ts: float, n_bytes: int, address: int, tid: int = 1, device: int = 0) -> dict:
    args = {"Bytes": n_bytes, "Addr": address, "Device Type": device, "Total Allocated": 1}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "tid": tid, "ts": ts, "args": args}


def link(number: int, forward: tuple[int, float], backward: tuple[int, float]) -> list[dict]:
    both = zip("sf", (forward, backward), strict=True)
    return [{"ph": ph, "id": number, "cat": "fwdbwd", "name": "fwdbwd", "tid": tid, "ts": ts} for ph, (tid, ts) in both]


def measured(events: list[dict]) -> Any:
    # in no order, as a trace may be
    content = {"traceEvents": [{"ph": "M", "name": "process_name", "ts": 0, "args": {"name": "python"}}, *reversed(events)]}
    return measure(decode(json.dumps(content).encode()))


def test_each_moment_counts_for_the_innermost_kind_of_work() -> None:
    found = measured(
        [
            STEPS,
            span(kinds.DATA, 0, 10, cat="user_annotation"),
            span("aten::index_select", 2, 4),  # of the data, whatever it does
            span(kinds.STEP, 10, 80, cat="user_annotation"),
            span("aten::linear", 12, 20),
            span("aten::t", 12, 1),  # a view belongs to what asks for it
            span("aten::mm", 14, 15),
            span("aten::copy_", 15, 3),
            span("attention", 40, 10, cat="user_annotation"),
            span("aten::bmm", 41, 6),
            span("autograd::engine::evaluate_function: BmmBackward0", 60, 8),
            span("BmmBackward0", 61, 6),  # the gradient of the product in attention
            span("aten::bmm", 62, 4),
            span("aten::mul", 70, 2),
            span("aten::view", 80, 1),
            span("aten::mul", 20, 30, tid=2),  # another thread
            span("aten::mul", 150, 30),  # after the steps
            *link(7, (1, 41.0), (1, 61.0)),
        ]
    )
    assert found.time_us == 100.0
    assert not found.is_of_device
    assert {kind: (one.time_us, one.calls) for kind, one in found.work.items()} == {
        kinds.DATA: (10.0, 1),
        kinds.BETWEEN: (100.0 - 10 - 20 - 10 - 8 - 2 - 1, 0),
        kinds.MATRIX_PRODUCTS: (17.0, 1),
        kinds.COPIES: (3.0, 1),
        kinds.ATTENTION: (16.0, 2),
        kinds.OTHER: (3.0, 2),
        kinds.ELEMENTWISE: (2.0, 1),
    }
    assert sum(one.time_us for one in found.work.values()) == found.time_us


def test_memory_is_that_of_who_allocated_it_and_of_the_fullest_moment() -> None:
    found = measured(
        [
            STEPS,
            memory(-5, 1000, 1),  # was there before
            span("aten::mm", 10, 10),
            memory(11, 40, 2),
            memory(12, 30, 3),
            memory(13, -30, 3),
            memory(14, -1000, 1),
            span("aten::mul", 30, 10),
            memory(31, 45, 3),  # the address again
            memory(32, -40, 2),
            memory(33, 20, 4),
            memory(60, 7, 5, device=1),  # not the host's
            memory(70, 5, 6),
        ]
    )
    assert found.work[kinds.MATRIX_PRODUCTS] == Work(10.0, 1, 70, 40)
    assert found.work[kinds.ELEMENTWISE] == Work(10.0, 1, 65, 45)
    assert found.work[kinds.BETWEEN] == Work(80.0, 0, 5, 0)
    assert found.peak_bytes == 85


def test_of_a_device_its_kernels_are_counted_and_the_time_without_any() -> None:
    found = measured(
        [
            STEPS,
            span("attention", 0, 10, cat="user_annotation", external_id=1),
            span("aten::bmm", 1, 5, external_id=2),
            span("aten::silu", 20, 5, external_id=3),
            memory(21, 64, 1, device=1),
            memory(21, 99, 2),
            span("cutlass_80_gemm", 30, 20, tid=7, cat="kernel", external_id=2),
            span("vectorized", 40, 20, tid=8, cat="kernel", external_id=3),  # 10 of them at the same time
            span("Memcpy HtoD", 70, 5, tid=7, cat="gpu_memcpy"),
            span("ampere_sgemm", 90, 20, tid=7, cat="kernel"),  # half of it after the steps
            span("later", 100, 20, tid=7, cat="kernel", external_id=3),
        ]
    )
    assert found.is_of_device
    assert {kind: (one.time_us, one.calls) for kind, one in found.work.items()} == {
        kinds.ATTENTION: (20.0, 1),
        kinds.ELEMENTWISE: (10.0, 1),
        kinds.COPIES: (5.0, 1),
        kinds.MATRIX_PRODUCTS: (10.0, 1),
        kinds.IDLE: (55.0, 0),
    }
    assert found.work[kinds.ELEMENTWISE].allocated_bytes == 64
    assert found.peak_bytes == 64


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            kinds.MATRIX_PRODUCTS,
            "aten::mm aten::_int_mm aten::linear aten::baddbmm sm90_xmma_gemm_bf16 minitune::widened_product",
        ),
        (kinds.ATTENTION, "aten::_scaled_dot_product_flash_attention minitune::attend_in_blocks_backward fmha_cutlassF"),
        (kinds.ELEMENTWISE, "aten::mul aten::_softmax aten::rsqrt aten::silu_backward triton_poi_fused_add_mul aten::pow"),
        (kinds.HEAD, "aten::cross_entropy_loss aten::nll_loss_backward aten::_log_softmax"),
        (kinds.OPTIMIZER, "aten::_fused_adamw_ multi_tensor_apply_kernel"),
        (kinds.COPIES, "aten::copy_ aten::_to_copy aten::to aten::cat aten::index_select Memcpy aten::embedding aten::zeros"),
        (kinds.COMMUNICATION, "nccl:all_reduce c10d::allreduce_ ncclDevKernel_AllGather"),
        (None, "aten::view aten::reshape aten::t aten::empty_strided MmBackward0 aten::expand aten::as_strided aten::item"),
    ],
)
def test_names_have_their_kinds(kind: str | None, names: str) -> None:
    assert {name: kinds.kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_what_is_no_trace_of_a_profile_is_refused() -> None:
    with pytest.raises(InputError, match=r"profile: the trace can't be read \(.*\), expected what torch.profiler exports"):
        decode(b'{"traceEvents": [')
    with pytest.raises(InputError, match="profile: the trace has no range 'recorded steps', expected one of a whole profile"):
        measured([span("aten::mm", 0, 5)])


def test_the_words_name_what_takes_most() -> None:
    work = {
        kinds.MATRIX_PRODUCTS: Work(71e4),
        kinds.ATTENTION: Work(2e5, 3, 2**20, 2**19),
        kinds.COPIES: Work(4e4),
        "none": Work(),
    }
    work[kinds.OPTIMIZER] = Work(5e4)
    profile = stage_profile(measured([STEPS])._replace(time_us=1e6, work=work), (10, 12), "t", None)
    assert profile.sentence() == (
        "steps 10 to 12 took 1 s, 0.333 s each: 71% of it is matrix products, 20% attention, 5% optimizer and 4% the rest"
    )
    assert [one.kind for one in profile.kinds] == [kinds.MATRIX_PRODUCTS, kinds.ATTENTION, kinds.OPTIMIZER, kinds.COPIES]
    assert profile.kinds[1].cells == ("attention", "0.2000", "20.0%", "3", "1.0", "0.5")
    one = msgspec.structs.replace(profile, steps=(3, 3), kinds=(KindOfWork("optimizer", 1.0, 1.0, 1, 0, 0),))
    assert one.sentence() == "step 3 took 1 s: 100% of it is optimizer"
    tables = [drawn_table("train", profile, width) for width in (120, 60)]
    assert [[str(column.header) for column in table.columns] for table in tables] == [list(TITLES), list(TITLES[:3])]


EVALUATED = LORA + TRAIN + 'evaluate = { data = "heldout", every = 2 }\n'


def refused(*_: object, **__: object) -> None:
    raise AssertionError("a profiler was asked for")


def test_recording_changes_no_bit_and_nothing_is_recorded_outside_of_the_steps(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recording, "profile", refused)
        patch.setattr(torch.profiler, "record_function", refused)
        run(tmp_path, tiny, EVALUATED, name="plain")
    assert not (tmp_path / "plain/profile").exists()

    is_recorded: list[bool] = []
    asked = hardware._is_recorded
    monkeypatch.setattr(hardware, "_is_recorded", lambda: (is_recorded.append(asked()), is_recorded[-1])[1])
    run(tmp_path, tiny, EVALUATED, "profile.steps=[2, 3]", name="recorded")
    changes = [a != b for a, b in itertools.pairwise(is_recorded)]
    assert (is_recorded[0], is_recorded[-1], sum(changes)) == (False, False, 2)

    folder = tmp_path / "recorded"
    assert rows_without_time(tmp_path / "plain") == rows_without_time(folder)
    for name, w in weights(tmp_path / "plain").items():
        assert torch.equal(w, weights(folder)[name]), name

    profile = read_profiles(folder)["train"]
    assert (profile.steps, profile.of_device, profile.snapshot) == ((2, 3), False, None)
    assert sum(one.time_s for one in profile.kinds) == pytest.approx(profile.time_s, rel=1e-6)
    assert sum(one.share for one in profile.kinds) == pytest.approx(1.0, rel=1e-6)
    found = {one.kind for one in profile.kinds}
    assert {kinds.MATRIX_PRODUCTS, kinds.ATTENTION, kinds.HEAD, kinds.OPTIMIZER, kinds.DATA, kinds.EVALUATION} <= found
    assert profile.peak_bytes > 0
    with gzip.open(folder / profile.trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == kinds.STEP and event["ph"] == "X" for event in events) == 2
    assert [path.name for path in (folder / "profile").iterdir()] == ["train-steps-2-3.json.gz"]
    said, log = capsys.readouterr().out, (folder / "log.txt").read_text(encoding="utf-8")
    for text in (said, log):
        assert f"train: {profile.sentence()}\n" in text
        assert re.search(r"│ attention +│ +[\d.]+ │ +[\d.]+% │", text)
        assert "train: no snapshot of memory, which only CUDA makes\n" in text


def test_the_time_of_the_table_is_that_of_the_steps_and_the_page_says_it_in_words(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, LORA + TRAIN, "train.batch_size=32", "train.save_every=9", "profile.steps=[3, 4]")
    folder = tmp_path / "p"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rates = [
        json.loads(line)["tokens_per_second"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    n_tokens = summary["train"]["time_s"] / sum(1 / rate for rate in rates)  # of a step, whose rows are as long
    profile = read_profiles(folder)["train"]
    assert profile.time_s == pytest.approx(sum(n_tokens / rate for rate in rates[2:]), rel=0.05)

    text = page({"p": read_run(folder)}, script="x.js")
    assert "<h2>Where time and memory went</h2>" in text
    assert f"train: {profile.sentence()}." in text
    for line in profile.kinds:
        assert "".join(f"<td>{cell}</td>" for cell in line.cells) in text
    assert "profile/train-steps-3-4.json.gz opens in ui.perfetto.dev" in text
    (folder / "profile.json").unlink()
    assert "Where time and memory went" not in page({"p": read_run(folder)}, script="x.js")


@pytest.mark.parametrize(("after_step", "is_whole"), [(1, True), (2, False)])
def test_a_run_that_dies_has_a_whole_profile_or_none(
    after_step: int,
    is_whole: bool,
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("train.save_every=1", "profile.steps=[2, 3]")
    run_killed(tmp_path, tiny, LORA + TRAIN, *words, after_step=after_step, monkeypatch=monkeypatch)
    folder = tmp_path / "killed"
    assert ("train" in read_profiles(folder)) == is_whole
    assert [path.name for path in folder.glob("profile/*")] == (["train-steps-2-3.json.gz"] if is_whole else [])
    said = capsys.readouterr().out
    assert "train: no profile of steps 2 to 3: training ended before the last of them\n" in said
    assert ("train: no profile of steps 2 to 3: training goes on at step 3\n" in said) == (not is_whole)


DPO = TRAIN.replace('data = "train"', 'name = "dpo"\ndata = "pairs"\nloss = { kind = "dpo" }')
SWEEP = TRAIN + 'evaluate = { data = "heldout", every = 2 }\nsweep = { "optimizer.lr" = [0.01, 0.05] }\n'


def test_every_training_stage_has_its_profile_whatever_its_steps_are(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, LORA + SWEEP + DPO, "profile.steps=[1, 1]")
    profiles = read_profiles(tmp_path / "p")
    assert list(profiles) == ["train", "dpo"]
    for profile in profiles.values():
        shares = {one.kind: one.share for one in profile.kinds}
        assert all(shares[kind] > 0 for kind in (kinds.ATTENTION, kinds.HEAD, kinds.OPTIMIZER, kinds.MATRIX_PRODUCTS))


def test_training_that_ends_early_within_the_steps_says_so(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = TRAIN + 'evaluate = { data = "heldout", every = 1, patience = 1, min_delta = 1e9 }\n'
    run(tmp_path, tiny, LORA + train, "profile.steps=[2, 4]")
    assert read_profiles(tmp_path / "p") == {}
    assert "train: no profile of steps 2 to 4: training ended before the last of them" in capsys.readouterr().out


def test_a_profile_is_no_part_of_what_is_run(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tiny, LORA + TRAIN, "profile.steps=[1, 2]")
    assert start(tmp_path, tiny, LORA + TRAIN, "profile.steps=[2, 3]") == 0
    assert start(tmp_path, tiny, LORA + TRAIN) == 0
    assert capsys.readouterr().out.count("is finished: nothing is left to run") == 2
    run(tmp_path, tiny, LORA + TRAIN, "train.steps=5", "profile.steps=[1, 2]")
    assert "no profile" not in capsys.readouterr().out  # it has one of these steps, which goes along
    assert (tmp_path / "p" / read_profiles(tmp_path / "p")["train"].trace).is_file()
    run(tmp_path, tiny, LORA + TRAIN, "train.steps=7", "profile.steps=[2, 3]")
    assert "train: no profile of steps 2 to 3: training goes on at step 6\n" in capsys.readouterr().out
    run(tmp_path, tiny, LORA + TRAIN, "train.steps=8", "profile.steps=[8, 8]")
    assert read_profiles(tmp_path / "p")["train"].steps == (8, 8)


SECOND = TRAIN.replace('op = "train"', 'op = "train"\nname = "second"').replace("steps = 4", "epochs = 1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("profile.steps=[3, 2]", r"profile: steps is \[3, 2\], expected the first step before the last; write \[2, 3\]"),
        (
            "profile.steps=[2, 6]",
            r"program: profile.steps = \[2, 6\], but train takes 4 steps, second takes 5 steps, expected steps",
        ),
        ("profile.steps=[0, 6]", r"profile.steps\[0\] is 0, expected int >= 1"),
        ("profile.steps=4", "profile.steps is 4, expected array"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_steps_that_are_not_taken_are_found_before_anything_runs(
    verb: str, words: str, said: str, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = ("check",) if verb == "check" else ()
    assert start(tmp_path, tiny, LORA + TRAIN + SECOND, words, verb=verbs) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "p").exists()


def test_a_stage_that_ends_before_the_steps_is_told(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, tiny, LORA + TRAIN + SECOND, "profile.steps=[5, 5]", verb=("check",)) == 0
    assert "note: train takes 4 steps, so that profile.steps = [5, 5] records none of it" in capsys.readouterr().out
    assert start(tmp_path, tiny, evaluation("before"), "profile.steps=[5, 5]", verb=("check",)) == 2
    assert "program: profile.steps = [5, 5], but no stage trains, expected a train stage" in capsys.readouterr().err


def test_on_a_device_all_steps_are_read_where_a_profile_begins_and_ends() -> None:
    cuda, loop = torch.device("cuda"), loop_state.begin(1)
    none_due = Due(evaluation=False, save=False, stop=False, end=False, profile=False)
    assert n_waiting(none_due, loop, cuda) == 1
    assert n_waiting(none_due._replace(profile=True), loop, cuda) == 0


class FakeProfiler(torch.profiler.profile):
    """torch.profiler of a machine with CUDA, which writes a small trace."""

    def __init__(self, activities: list, profile_memory: bool) -> None:
        assert torch.profiler.ProfilerActivity.CUDA in activities
        assert profile_memory

    def start(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def export_chrome_trace(self, path: str, use_python_export: bool = False) -> None:
        Path(path).write_text(json.dumps({"traceEvents": [STEPS, span("gemm", 0, 5, tid=3, cat="kernel")]}), encoding="utf-8")


def test_cuda_leaves_a_snapshot_and_forgets_the_history(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(recording, "profile", FakeProfiler)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *_, **how: asked.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"written by torch"))
    init = recording.Recording.__init__
    on_cuda = lambda self, stage, state, device: init(self, stage, state, torch.device("cuda"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "__init__", on_cuda)
        patch.setattr("minitune.programs.stages.training_loop.peak_mem_bytes", lambda device: 1)
        run(tmp_path, tiny, LORA + TRAIN, "profile.steps=[2, 3]")
    profile = read_profiles(tmp_path / "p")["train"]
    assert isinstance(profile, StageProfile)
    assert profile.of_device
    assert profile.snapshot == "profile/train-steps-2-3.snapshot.pickle"
    assert (tmp_path / "p" / profile.snapshot).read_bytes() == b"written by torch"
    assert asked == [{"max_entries": recording.MEMORY_EVENTS}, {"enabled": None}]
