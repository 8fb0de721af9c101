"""Runs: the folder, the manifest, the lock, what is resumed and what is moved aside, signals, and the fold over stages."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch

from minitune import __version__
from minitune.data.source import MixtureComponent, Source
from minitune.errors import DiskFullError, InputError
from minitune.io import locks, results
from minitune.io.atomic import write_atomic
from minitune.models.model import Model
from minitune.models.open import FAMILIES
from minitune.programs import program, records, run, run_folder
from minitune.programs.check import Checked
from minitune.programs.loading import ModelSource
from minitune.programs.log import Log, LogConfig
from minitune.programs.program import Program
from minitune.programs.records import summary
from minitune.programs.run import run_program
from minitune.programs.run_folder import Run, open_run
from minitune.programs.signals import Stopped, StopSignals
from minitune.programs.state import AbstractState, PipelineState


class Count(msgspec.Struct, frozen=True, tag="count", tag_field="op"):
    """A stage that logs `steps` rows, and before step `signal_at` gets a signal."""

    observes: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    steps: int
    name: str
    signal_at: int | None = None
    fail: bool = False

    @property
    def label(self) -> str:
        return self.name

    def check(self, abstract: AbstractState) -> AbstractState:
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        if self.name in state.records:
            return state
        with state.stopping.after_step():
            for step in range(1, self.steps + 1):
                if self.fail:
                    raise RuntimeError("power cut")
                if step == self.signal_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                if state.stopping():
                    raise Stopped(step, state.folder)
                state.log.metrics(step, {"loss": 1.0 / step})
        record = {"top": {"steps": self.steps}, "last": self.steps}
        return state._replace(records={**state.records, self.name: record})


@pytest.fixture(autouse=True)
def fake_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """States without a model: what a run does with its stages does not depend on what they do."""

    def open_pipeline(model, sources, seed, folder, log, stopping, records, tf32, **ahead) -> PipelineState:
        return PipelineState(seed, folder, log, stopping, {}, records, loaded=None)

    monkeypatch.setattr(run, "open_pipeline", open_pipeline)
    nothing = AbstractState({}, Model(FAMILIES["llama"], None), {})
    monkeypatch.setattr(run, "check", lambda model, sources, stages, say: Checked([], sources, [], nothing))


@pytest.fixture
def tiny(tmp_path: Path) -> Program:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    return Program(
        name="tiny",
        out=str(tmp_path / "runs"),
        model=ModelSource(path=str(tmp_path / "model")),
        data={"train": Source(path=str(tmp_path / "train.jsonl"), format="text", seq_len=5)},
        stage=(Count(3, "one"), Count(2, "two")),  # pyright: ignore[reportArgumentType]
    )


def changed(p: Program, **fields: Any) -> Program:
    return msgspec.structs.replace(p, **fields)


def opened(p: Program) -> Run:
    run = open_run(program.WrittenProgram(p))
    run.lock.close()
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_its_program_manifest_records_metrics_and_summary(tiny: Program, tmp_path: Path) -> None:
    result = run_program(tiny)
    folder = tmp_path / "runs" / "tiny"
    assert all(result[name].pop("time_s") > 0 for name in ("one", "two"))
    assert result == {"one": {"last": 3}, "two": {"last": 2}, "steps": 2}
    kept = json.loads((folder / "summary.json").read_bytes())
    assert {name: kept[name]["last"] for name in ("one", "two")} == {"one": 3, "two": 2}
    assert (folder / "program.toml").read_text(encoding="utf-8") == program.resolved(tiny)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("one", 1), ("one", 2), ("one", 3), ("two", 1), ("two", 2)]
    assert set(json.loads((folder / "records.json").read_bytes())) == {"one", "two"}
    assert (folder / "checkpoints").is_dir()


def test_numbers_that_json_lacks_become_null(tiny: Program) -> None:
    class Diverged(Count, frozen=True, tag="diverged"):
        def run(self, state: PipelineState) -> PipelineState:
            return state._replace(records={"one": {"loss_nats": math.nan, "worst": math.inf}})

    run_program(changed(tiny, stage=(Diverged(3, "one"),)))
    for name in ("records.json", "summary.json"):
        (record,) = json.loads((Path(tiny.out) / "tiny" / name).read_bytes()).values()
        assert (record["loss_nats"], record["worst"]) == (None, None)


def test_the_manifest_names_versions_seed_and_inputs(tiny: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "HASHED_BELOW_BYTES", 7)  # "weights" has 7 bytes
    manifest = json.loads((opened(changed(tiny, seed=5)).folder / "manifest.json").read_bytes())
    (start,) = manifest["starts"]
    assert manifest["seed"] == 5
    assert (start["host"], start["pid"]) == (socket.gethostname(), os.getpid())
    assert start["versions"]["minitune"] == __version__
    assert start["versions"]["python"] == platform.python_version()
    assert start["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    config, weights, data = (str(tmp_path / name) for name in ("model/config.json", "model/model.safetensors", "train.jsonl"))
    assert set(manifest["inputs"]) == {config, weights, data}
    assert manifest["inputs"][config] == {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    assert manifest["inputs"][data]["sha256"] == hashlib.sha256(b'{"text": "x"}\n').hexdigest()
    assert set(manifest["inputs"][weights]) == {"bytes", "time"}


def test_every_file_of_mixtures_patterns_folders_and_tasks_is_in_the_manifest_by_its_hash(
    tiny: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = (
        "p-1.jsonl",
        "p-2.jsonl",
        "mixed.jsonl",
        "shards/a.jsonl",
        "shards/deep/b.jsonl",
        "tasks/t.yaml",
        "tasks/deep/u.yaml",
    )
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")

    class Asks(Count, frozen=True, tag="asks"):
        include: str = "tasks"

    source = Source(path="p-*.jsonl", format="text", seq_len=5, mix=(MixtureComponent("mixed.jsonl", 0.2),))
    data = {"train": source, "held": Source(path="shards", format="text", seq_len=5)}
    whole = changed(tiny, data=data, stage=(Asks(1, "one"),))  # pyright: ignore[reportArgumentType]
    inputs = json.loads((opened(whole).folder / "manifest.json").read_bytes())["inputs"]
    for name in names:
        assert inputs[name]["sha256"] == hashlib.sha256(Path(name).read_bytes()).hexdigest()
    for name in names:  # a file that comes, changes or goes is named
        (tmp_path / name).write_text('{"text": "other"}\n', encoding="utf-8")
        with pytest.raises(InputError, match=rf"runs: {name} is not what it was when"):
            opened(whole)
        Path(name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    Path("p-3.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"runs: p-3.jsonl is not what it was when"):
        opened(whole)


def test_an_unfinished_run_of_the_same_program_is_continued(tiny: Program) -> None:
    broken = changed(tiny, stage=(tiny.stage[0], Count(2, "two", fail=True)))
    with pytest.raises(RuntimeError, match="power cut"):
        run_program(broken)
    run = opened(changed(broken, log=LogConfig(every=7), resume=True, out=f"{tiny.out}/../runs"))
    assert run.resumed
    assert set(run.records) == {"one"}
    assert run.notes == (f"{run.folder} is unfinished: continuing it",)
    manifest = json.loads((run.folder / "manifest.json").read_bytes())
    assert len(manifest["starts"]) == 2
    assert [json.loads(line)["stage"] for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()] == [
        "one"
    ] * 3
    assert {path.name for path in run.folder.parent.iterdir()} == {"tiny", ".tiny.lock"}


def test_a_changed_version_is_told(tiny: Program) -> None:
    folder = opened(tiny).folder
    manifest = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(
        manifest.replace(f'"python": "{platform.python_version()}"', '"python": "3.0.0"'), encoding="utf-8"
    )
    message = (
        f"versions changed since it was stopped (python 3.0.0 -> {platform.python_version()}): it may not continue bit for bit"
    )
    assert opened(tiny).notes[1] == message


class Crash(Exception):  # noqa: N818 - no error of a program
    """Something went wrong after the last record was written."""


def never(state: PipelineState) -> PipelineState:
    raise AssertionError("a stage ran in a finished run")


@pytest.mark.parametrize("resume", [None, True])
def test_a_finished_run_whose_command_comes_again_is_finished(
    tiny: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    resume: bool | None,
) -> None:
    def crash(*args: Any) -> None:
        raise Crash

    # a tracker that uploads while a preempted process is killed: the summary is there, the exit code is not
    with monkeypatch.context() as patch:
        patch.setattr(Log, "show", crash)
        with pytest.raises(Crash):
            run_program(tiny)
    folder = tmp_path / "runs" / "tiny"
    before = files(folder)
    monkeypatch.setattr(Count, "run", never)
    result = run_program(changed(tiny, resume=resume))
    assert result == json.loads((folder / "summary.json").read_bytes())
    assert "tiny is finished: nothing is left to run; resume = false begins afresh" in capsys.readouterr().out
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_a_finished_run_on_other_data_begins_afresh(tiny: Program, tmp_path: Path) -> None:
    run_program(tiny)
    (tmp_path / "train.jsonl").write_text('{"text": "y"}\n', encoding="utf-8")
    run = opened(tiny)
    assert not run.resumed
    message = r"tiny is finished, and \S+train\.jsonl is not what it was when it began: moved to \S+tiny\.1"
    assert re.search(message, run.notes[0])


def test_a_finished_run_whose_result_is_gone_begins_afresh(tiny: Program, tmp_path: Path) -> None:
    class Writes(Count, frozen=True, tag="writes"):
        @property
        def result(self) -> results.Result:  # pyright: ignore[reportIncompatibleVariableOverride]
            return results.Result(str(tmp_path / "result"), "file")

        def run(self, state: PipelineState) -> PipelineState:
            (tmp_path / "result").write_text("weights", encoding="utf-8")
            return super().run(state)

    writes = changed(tiny, stage=(Writes(3, "one"),))
    run_program(writes)
    assert opened(writes).summary is not None
    (tmp_path / "result").unlink()
    run = opened(writes)
    assert run.summary is None
    assert "is finished, but its result" in run.notes[0]


@pytest.mark.parametrize("resume", [None, False])
def test_a_finished_run_is_moved_aside_and_never_deleted(tiny: Program, tmp_path: Path, resume: bool | None) -> None:
    out = tmp_path / "runs"
    kept = []
    for n in range(3):
        run_program(changed(tiny, seed=n, resume=resume))
        kept.append(files(out / "tiny"))
    assert [files(out / name) for name in ("tiny.1", "tiny.2", "tiny")] == kept
    run = opened(changed(tiny, resume=False))
    assert not run.resumed
    assert run.records == {}
    assert run.notes == (f"{out}/tiny is not to be continued (resume = false): moved to {out}/tiny.3",)


def test_another_program_or_resume_false_begins_afresh(tiny: Program, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert opened(tiny).notes == ()
    other = opened(changed(tiny, stage=(tiny.stage[0], Count(9, "two"))))
    assert other.notes == (f"{out}/tiny holds another program (two.steps is 2 there and 9 here): moved to {out}/tiny.1",)
    assert not other.resumed
    fresh = opened(changed(tiny, stage=(tiny.stage[0], Count(9, "two")), resume=False))
    assert fresh.notes == (f"{out}/tiny is not to be continued (resume = false): moved to {out}/tiny.2",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 3}, r"holds another program \(seed is 0 there and 3 here\), expected an unfinished run to resume"),
        ({"stage": (Count(3, "one"),)}, r"holds another program \(stage two stands only there\)"),
        ({"stage": (Count(3, "one"), Count(2, "two", signal_at=1))}, r"\(two.signal_at stands only here\)"),
        ({"name": "new"}, r"runs/new does not exist, expected an unfinished run to resume; drop resume = true"),
    ],
)
def test_resume_true_needs_an_unfinished_run_of_this_program(tiny: Program, fields: dict[str, Any], message: str) -> None:
    before = files(opened(tiny).folder)
    with pytest.raises(InputError, match=message):
        opened(changed(tiny, resume=True, **fields))
    assert files(Path(tiny.out) / "tiny") == before


def test_a_folder_that_is_no_run_is_left_alone(tiny: Program, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    opened(tiny)  # an empty folder is no obstacle
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work", encoding="utf-8")
    for resume in (None, True, False):
        with pytest.raises(
            InputError, match=r"other holds no manifest.json, expected a run folder; change name or out, or move it"
        ):
            opened(changed(tiny, name="other", resume=resume))
    assert files(other) == {"thesis.tex": b"years of work"}
    (tmp_path / "runs" / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"file holds no manifest.json, expected a run folder"):
        opened(changed(tiny, name="file"))


def test_changed_inputs_stop_a_resume(tiny: Program, tmp_path: Path) -> None:
    opened(tiny)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"Weights")
    with pytest.raises(InputError, match=r"runs: \S+model.safetensors is not what it was when \S+tiny began, expected the same"):
        opened(tiny)
    weights.write_bytes(b"weights")
    (tmp_path / "model" / "extra.json").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"runs: \S+extra.json is not what it was .*; restore it, or set resume = false"):
        opened(tiny)
    assert not opened(changed(tiny, resume=False)).resumed


def test_every_file_of_a_list_a_pattern_and_a_folder_is_in_the_manifest(tiny: Program, tmp_path: Path) -> None:
    for name in ("a.jsonl", "shards/0.jsonl", "shards/deep/1.jsonl", "more-1.jsonl", "more-2.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n', encoding="utf-8")
    paths = tuple(str(tmp_path / name) for name in ("a.jsonl", "shards", "more-*.jsonl"))
    listed = changed(tiny, data={"train": Source(path=paths, format="text", seq_len=5)})
    opened(listed)
    inputs = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text(encoding="utf-8"))["inputs"]
    places = [tmp_path / "a.jsonl", *tmp_path.glob("shards/**/*.jsonl"), *tmp_path.glob("more*")]
    data = {name: record for name, record in inputs.items() if name.endswith(".jsonl")}
    hashes = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in places}
    assert {name: record["sha256"] for name, record in data.items()} == hashes
    # one that came later matches the pattern, and makes another data set
    (tmp_path / "more-3.jsonl").write_text('{"text": "z"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"runs: \S+more-3.jsonl is not what it was"):
        opened(listed)


def test_a_missing_input_is_named_before_anything_is_made(tiny: Program, tmp_path: Path) -> None:
    gone = changed(tiny, data={"train": Source(path="gone.jsonl", format="text", seq_len=5)})
    message = r"runs: data.train.path 'gone.jsonl' does not exist \(looked for /.*gone.jsonl\), expected a file or folder"
    with pytest.raises(InputError, match=message):
        opened(gone)
    folder = tmp_path / "runs" / "tiny"
    assert not folder.exists()
    run_program(tiny)
    before = files(folder)
    with pytest.raises(InputError, match=message):
        opened(gone)
    assert files(folder) == before  # not moved aside for a run that can't begin


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b"{}"),
        ("manifest.json", b'{"seed": 0, "inputs": {}, "starts": []}'),
        ("records.json", b"[]"),
        ("records.json", b'{"train": 7}'),
        ("records.json", b'{"train": {"top": [1]}}'),
        ("records.json", b'{"train": {"samples": [{"prompt": "p"}]}}'),
        ("records.json", b'{"train": {"loss_nats": "low"}}'),
        ("records.json", b"\xff"),
        ("manifest.json", b"\xff"),
        ("program.toml", b"= 1"),
        ("program.toml", b"\xff"),
    ],
)
def test_a_damaged_state_stops_the_run_and_says_what_to_do(tiny: Program, name: str, text: bytes) -> None:
    folder = opened(tiny).folder
    (folder / name).write_bytes(text)
    with pytest.raises(InputError, match=rf"{name}.*expected (a JSON object; set|its figures; set|TOML)"):
        opened(tiny)
    (folder / name).unlink()
    if name != "manifest.json":
        with pytest.raises(InputError, match=rf"{name} can't be read .*, expected .*; set resume = false"):
            opened(tiny)
        assert not opened(changed(tiny, resume=False)).resumed


class Unplugged(Exception):  # noqa: N818 - no error of a program
    """The machine went away at this point."""


@pytest.mark.parametrize("at", range(5))
def test_a_run_folder_exists_whole_or_not_at_all(tiny: Program, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    opened(tiny)
    fresh, calls = changed(tiny, resume=False), iter(range(100))

    def unplugged(real):
        def call(*args: Any) -> Any:
            if next(calls) == at:
                raise Unplugged
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for room in (run_folder, records):
            patch.setattr(room, "write_atomic", unplugged(write_atomic))
        patch.setattr(Path, "rename", unplugged(Path.rename))
        with pytest.raises(Unplugged):
            opened(fresh)
    folder = Path(tiny.out) / "tiny"
    names = {"program.toml", "manifest.json", "records.json"}
    assert not folder.exists() or set(files(folder)) == names
    run = opened(tiny)
    assert set(files(run.folder)) == names
    # the last call gives the new folder its name, which the next start does where it was not done
    assert run.resumed


def test_a_second_trainer_is_refused_with_the_first_ones_pid_and_host(tiny: Program) -> None:
    run = open_run(program.WrittenProgram(tiny))
    message = rf"runs: \S+tiny is in use by pid {os.getpid()} on {socket.gethostname()}, expected one trainer a folder; wait"
    for resume in (None, True, False):
        with pytest.raises(InputError, match=message):
            opened(changed(tiny, resume=resume))
    run.lock.close()
    assert opened(tiny).resumed


def test_a_killed_trainer_leaves_no_lock(tiny: Program, tmp_path: Path) -> None:
    lock = tmp_path / "runs" / ".tiny.lock"
    lock.parent.mkdir()
    hold = (
        "import sys, time; from pathlib import Path; from minitune.io import locks; path = Path(sys.argv[1]); "
        "lock = locks.acquire(path); locks.holder_file(path).write_text('pid 7 on far'); "
        "print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match=r"tiny is in use by pid 7 on far, expected one trainer a folder"):
            opened(tiny)
        other.kill()
    with open_run(program.WrittenProgram(tiny)).lock:
        assert locks.holder_file(lock).read_text(encoding="utf-8") == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_an_error_while_opening_lets_the_lock_go(tiny: Program, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        opened(changed(tiny, resume=True))
    locks.acquire(tmp_path / "runs" / ".tiny.lock").close()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals as a terminal leaves them, also where pytest runs under nohup; a test must leave them as they were."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before
    signal.signal(signal.SIGHUP, inherited)


@pytest.mark.usefixtures("handlers")
def test_sigterm_stops_between_steps_and_the_same_program_finishes_later(tiny: Program) -> None:
    stop = StopSignals()
    stages = (tiny.stage[0], Count(2, "two", signal_at=2))
    with pytest.raises(Stopped) as stopped:
        run_program(changed(tiny, stage=stages), stop)
    assert (stopped.value.step, stop.number) == (2, signal.SIGTERM)
    folder = Path(tiny.out) / "tiny"
    assert not (folder / "summary.json").exists()
    assert set(json.loads((folder / "records.json").read_bytes())) == {"one"}
    assert opened(changed(tiny, stage=stages)).resumed


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_a_stage_that_takes_no_steps_ends_it_at_once(tiny: Program, number: int) -> None:
    class Long(Count, frozen=True, tag="long"):
        def run(self, state: PipelineState) -> PipelineState:
            os.kill(os.getpid(), number)
            raise AssertionError("the stage went on")

    stop = StopSignals()
    stages = (Count(3, "one"), Long(2, "two"))
    with pytest.raises(Stopped) as stopped:
        run_program(changed(tiny, stage=stages), stop)
    assert (stopped.value.step, stop.number) == (3, number)  # steps of the training before it
    assert set(json.loads((Path(tiny.out) / "tiny" / "records.json").read_bytes())) == {"one"}
    assert opened(changed(tiny, stage=stages)).resumed


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_the_model_is_loaded_ends_the_run_at_once(tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **ahead: Any) -> PipelineState:
        os.kill(os.getpid(), signal.SIGHUP)
        raise AssertionError("loading went on")

    monkeypatch.setattr(run, "open_pipeline", load)
    with pytest.raises(Stopped, match="stopped at step 0"):
        run_program(tiny)
    assert opened(tiny).resumed


@pytest.mark.usefixtures("handlers")
def test_a_run_outlives_its_terminal_where_hangups_are_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as stopping, stopping.at_once(1, Path("runs/x")):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("handlers")
def test_steps_inside_a_stage_wait_and_an_evaluation_inside_them_does_not() -> None:
    with StopSignals() as stopping, stopping.at_once(1, Path("runs/x")), stopping.after_step():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
        with pytest.raises(Stopped, match="step 7"), stopping.at_once(7, Path("runs/x")):
            raise AssertionError("an evaluation began after the signal")


THREE_INTERRUPTS = """
import os, signal
from minitune.__main__ import main
from minitune.programs import run
from minitune.programs.signals import StopSignals
def interrupted(program, stop, end, written):
    with stop, stop.after_step():
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
run.run_program = interrupted
raise SystemExit(main(["lora"]))
"""


def test_a_third_sigint_ends_the_process_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", THREE_INTERRUPTS], capture_output=True, text=True)
    assert done.returncode == 130
    first, second = done.stderr.splitlines()
    assert first == "SIGINT: stopping after this step; Ctrl-C again ends at once, without a save"
    assert second == "SIGINT: ending at once, without a save"


@pytest.mark.usefixtures("handlers")
def test_a_signal_in_the_last_stage_lets_the_run_finish(tiny: Program) -> None:
    class Late(Count, frozen=True, tag="late"):
        def run(self, state: PipelineState) -> PipelineState:
            state = super().run(state)
            with state.stopping.after_step():
                os.kill(os.getpid(), signal.SIGTERM)
            return state

    assert run_program(changed(tiny, stage=(Late(3, "one"),)))["steps"] == 3


@pytest.mark.usefixtures("handlers")
def test_a_second_sigint_interrupts_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    try:
        with StopSignals() as stopping:
            assert not stopping()
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping()
            assert stopping.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one is no more than the first: launchers repeat themselves
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert capfd.readouterr().err.splitlines()[0].startswith("SIGINT: stopping after this step; Ctrl-C again")


@pytest.mark.usefixtures("handlers")
def test_a_console_that_closes_on_windows_stops_the_run_as_sigterm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)  # a number that this system has
    with StopSignals() as stopping:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping()
        assert stopping.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_run_goes_on_without_locks_and_says_so(tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise locks.Unsupported("Function not implemented")

    monkeypatch.setattr(locks, "acquire", refuse)
    run = opened(tiny)
    assert run.notes == (
        f"{tiny.out}/.tiny.lock can't be locked (Function not implemented): start no second run of this name now",
    )
    assert opened(tiny).resumed


def test_a_lock_that_cannot_be_opened_is_told(tiny: Program) -> None:
    (Path(tiny.out) / ".tiny.lock").mkdir(parents=True)
    with pytest.raises(InputError, match=r"runs: \S+\.tiny\.lock can't be locked \(.*\), expected a file; change out"):
        opened(tiny)


def test_places_where_no_run_can_be_are_told(tiny: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(InputError, match=r"runs: out '\S+' can't be made \(.*\), expected a folder; change out"):
            opened(changed(tiny, out=str(out)))
    Path(tiny.out).mkdir()
    (Path(tiny.out) / "tiny").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"tiny holds no manifest\.json, expected a run folder; change name or out"):
        opened(tiny)


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    handlers: list[Any] = []

    def enter() -> None:
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_summary_moves_top_up_and_keeps_the_rest_by_stage() -> None:
    records = {"before": {"loss_nats": 2.0}, "train": {"top": {"steps": 3}, "n": 1}, "more": {"top": {"steps": 5}}}
    assert summary(records) == {"before": {"loss_nats": 2.0}, "train": {"n": 1}, "more": {}, "steps": 5}


@pytest.mark.parametrize(
    ("place", "message"), [("create_folder", "out .* can't be made"), ("acquire", r"\.lock can't be locked")]
)
def test_a_disk_that_is_full_before_a_run_folder_is_made_is_told_as_one(
    place: str, message: str, tiny: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder if place == "create_folder" else run_folder.locks, place, full)
    with pytest.raises(DiskFullError, match=rf"runs: .*{message} .*No space left on device"):
        opened(tiny)
