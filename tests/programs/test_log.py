"""The terminal, metrics.jsonl and an offline wandb run, read back."""

import errno
import io
import json
import math
import re
import sys
from pathlib import Path
from time import sleep

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitune.errors import InputError
from minitune.programs import progress as shown_progress
from minitune.programs.log import Log, LogConfig
from minitune.programs.signals import Stopped
from minitune.trackers.wandb import WandbConfig
from support.wandb_files import history, wandb_records


def piped() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_say_and_show_print_what_they_are_given(tmp_path: Path) -> None:
    console = piped()
    with Log(tmp_path, LogConfig(), {}, console) as out:
        out.say("[not markup] " + "long " * 40)
        out.show(Text("[also not markup]"))
    text = written(console)
    assert "[not markup] " + "long " * 40 + "\n" in text
    assert "[also not markup]" in text


def test_metrics_are_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    with Log(tmp_path, LogConfig(), {}, piped()) as out:
        out.begin("train")
        out.metrics(1, {"loss": 1.5, "grad_norm": math.nan})
        assert rows(tmp_path) == [{"stage": "train", "step": 1, "loss": 1.5, "grad_norm": "nan"}]  # flushed row by row
        out.metrics(2, {"loss": math.inf, "grad_norm": -math.inf, "n": 3})
    assert rows(tmp_path)[1] == {"stage": "train", "step": 2, "loss": "inf", "grad_norm": "-inf", "n": 3}


def test_every(tmp_path: Path) -> None:
    with Log(tmp_path, LogConfig(every=3), {}, piped()) as out:
        for step in range(1, 8):
            out.metrics(step, {"loss": 0.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 6]


def logged(folder: Path, stages: dict[str, range]) -> None:
    """Log these steps of each stage, each stage rewound to where its steps begin."""
    with Log(folder, LogConfig(), {}, piped()) as out:
        for stage, steps in stages.items():
            out.begin(stage)
            out.rewind(steps.start - 1)
            for step in steps:
                out.metrics(step, {"loss": 1.0 / step})


def test_a_resumed_file_equals_a_straight_one(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    resumed.mkdir()
    logged(straight, {"one": range(1, 6), "two": range(1, 8)})
    logged(resumed, {"one": range(1, 6), "two": range(1, 5)})
    with (resumed / "metrics.jsonl").open("ab") as torn:
        torn.write(b'{"stage": "two", "step": 5, "lo')
    logged(resumed, {"one": range(6, 6), "two": range(3, 8)})  # saved after step 2 of the second stage
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_torn_row_is_cut_even_without_a_rewind(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "a", "step": 1}\n{"stage": "a", "step": 2}')
    with Log(tmp_path, LogConfig(), {}, piped()) as out:
        out.begin("b")
        out.metrics(1, {})
    assert rows(tmp_path) == [{"stage": "a", "step": 1}, {"stage": "b", "step": 1}]


def test_plain_lines_come_first_last_and_every_twentieth(tmp_path: Path) -> None:
    console = piped()
    with Log(tmp_path, LogConfig(), {}, console) as out, out.progress("train", 1000, 0) as progress:
        for step in range(1, 1001):
            progress.update(step, {"loss": 0.25, "lr": 3e-4, "tokens_per_second": 12345.6, "mem_bytes": 2**31})
    lines = written(console).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("train 1/1000  loss 0.2500  lr 3.00e-04  12,346 tokens/s  mem 2.00 GiB  0:")
    assert lines[-1].endswith("0:00 left")
    assert lines[-1].startswith("train 1000/1000")


def test_plain_lines_come_every_ten_seconds_and_tell_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(shown_progress, "monotonic", lambda: clock[0])
    console = piped()
    with Log(tmp_path, LogConfig(), {}, console) as out, out.progress("train", 10_000, 100) as progress:
        for step in range(101, 110):
            clock[0] += 4.0
            progress.update(step, {})
    assert [line.split()[1] for line in written(console).splitlines()] == ["101/10000", "104/10000", "107/10000"]
    assert written(console).splitlines()[1].endswith(f"{4 * 9896 // 60}:{4 * 9896 % 60:02} left")


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None, legacy_windows=False)
    with Log(tmp_path, LogConfig(), {}, console) as out, out.progress("train", 8, 2) as progress:
        progress.update(3, {"loss": 0.25, "lr": 1e-3})
        out.say("a line above it")
        progress.update(8, {"loss": 0.125, "lr": 1e-3})
    text = written(console)
    assert "a line above it" in text
    assert "8/8" in text
    assert "loss 0.1250  lr 1.00e-03" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_shows_count_and_time_and_no_cut_number(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    values = {"loss": 11.8125, "lr": 1e-3, "tokens_per_second": 12345.6, "mem_bytes": 2**31, "grad_norm": 1.5}
    with Log(tmp_path, LogConfig(), {}, console) as out, out.progress("save-merged", 1234, 2) as progress:
        progress.update(1234, values)
    text = written(console)
    assert "save-merged 1234/1234 0:00:00" in text
    assert "…" not in text
    whole = shown_progress.readings(values).split("  ")
    n_shown = {40: 0, 60: 2, 80: 3, 200: 5}[width]
    last = next(line for line in reversed(text.splitlines()) if "1234/1234" in line)
    assert [part for part in whole if part in last] == whole[:n_shown]
    assert ("━" in last) == (width == 200)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": 0.0}, "loss 0.0000"),
        ({"loss": 1e-5}, "loss 1.00e-05"),
        ({"grad_norm": 2.5e7}, "grad norm 2.50e+07"),
        ({"loss": math.nan}, "loss nan"),
        ({"loss": math.inf}, "loss inf"),
        ({"steps": 12345}, "steps 12,345"),
        ({"peak_mem_bytes": 5 * 2**20}, "peak mem 5 MiB"),
    ],
)
def test_readings(values: dict[str, float], text: str) -> None:
    assert shown_progress.readings(values) == text


def offline_run(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: range, n_adapters: int = 0) -> list:
    (folder / "wandb-files").mkdir(exist_ok=True)
    monkeypatch.setenv("WANDB_DIR", str(folder / "wandb-files"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    keywords = {"project": "p", "mode": "offline", "tags": ["a"], "config": {"mine": 1}}
    program = {"name": "tiny", "seed": 3, "stage": [{"op": "lora", "rank": 8}]}
    with Log(folder, LogConfig(wandb=WandbConfig(**keywords)), program, piped()) as out:
        out.begin("train")
        out.rewind(steps.start - 1)
        for step in steps:
            values = {"loss": 1.0 / step, "lr": 3e-4, "tokens_per_second": 100.5, "grad_norm": math.nan}
            for row in [{"adapter": i, **values, "loss": i / step} for i in range(n_adapters)] or [values]:
                out.metrics(step, row)
        record = {"loss_nats": 0.25, "tasks": {"t": {"acc": 0.5}}, "samples": [{"prompt": "p", "reference": "r", "answer": "a"}]}
        out.begin("after")
        out.record("after", record)
        out.summarize({"after": record, "steps": steps.stop - 1})
    for _ in range(200):  # its service closes the file only after it has said that the run is finished
        records = list(wandb_records(folder / "wandb-files"))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        sleep(0.05)
    raise AssertionError("the offline file has no exit record after 10 s")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_wandb_gets_evaluations_samples_and_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = offline_run(tmp_path, monkeypatch, range(1, 4))
    last = history(records)[-1]
    assert (last["after/loss_nats"], last["after/tasks/t/acc"], last["global_step"], last["_step"]) == (0.25, 0.5, 3, 3)
    assert last["after/samples._type"] == "table-file"
    (table,) = (tmp_path / "wandb-files").glob(f"wandb/offline-run-*/files/{last['after/samples.path']}")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert (content["columns"], content["data"]) == (["prompt", "reference", "answer"], [["p", "r", "a"]])
    summary: dict = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            items = record.summary.update
            summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    assert (summary["after/loss_nats"], summary["after/tasks/t/acc"], summary["steps"]) == (0.25, 0.5, 3)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_adapters_of_a_sweep_are_groups_of_one_step_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = history(offline_run(tmp_path, monkeypatch, range(1, 3), n_adapters=3))
    for row, step in zip(rows, (1, 2), strict=True):
        assert [row[f"adapter-{i}/loss"] for i in range(3)] == [i / step for i in range(3)]
        assert (row["_step"], row["global_step"], row["adapter-2/lr"]) == (step, step, 3e-4)
        assert "loss" not in row


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # wandb leaves the socket to its own service to the collector
def test_an_offline_wandb_run_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = offline_run(tmp_path, monkeypatch, range(1, 4))
    for row, step in zip(history(records), (1, 2, 3), strict=True):  # the last one has the record of the stage after it, too
        assert (row["global_step"], row["loss"], row["lr"], row["tokens_per_second"]) == (step, 1.0 / step, 3e-4, 100.5)
        assert row["_step"] == step
        assert "grad_norm" in row
    config: dict = {}
    for record in records:
        if record.WhichOneof("record_type") == "run":
            (run,) = [record.run]
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert config | {"_wandb": 0} == {"name": "tiny", "seed": 3, "stage": [{"op": "lora", "rank": 8}], "mine": 1, "_wandb": 0}
    assert (run.project, run.display_name, list(run.tags)) == ("p", "tiny", ["a"])
    assert run.run_id == (tmp_path / "wandb-id").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_continued_run_keeps_its_wandb_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb-id").write_text("abc123", encoding="utf-8")
    records = offline_run(tmp_path, monkeypatch, range(5, 6))
    assert {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"} == {"abc123"}
    assert (tmp_path / "wandb-id").read_text(encoding="utf-8") == "abc123"


def test_wandb_is_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # an import of it would fail
    with Log(tmp_path, LogConfig(), {}, piped()) as out:
        out.metrics(1, {"loss": 1.0})
    with (
        pytest.raises(InputError, match="the package wandb is not installed"),
        Log(tmp_path, LogConfig(wandb=WandbConfig()), {}, piped()),
    ):
        pass


class Gone(io.StringIO):
    """A terminal that was closed, or a pipe whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error, self.n_writes = error, 0

    def write(self, text: str) -> int:
        self.n_writes += 1
        raise self.error

    def fileno(self) -> int:
        raise ValueError("no descriptor")


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "terminal gone")], ids=str)
def test_a_run_outlives_its_terminal(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Gone(error)
    monkeypatch.setattr(sys, "stdout", gone)
    with Log(tmp_path, LogConfig(), {}) as out:
        out.begin("train")
        out.say("first")
        out.show(Text("second"))
        with out.progress("train", 2) as progress:
            progress.update(1, {"loss": 1.0})
        out.metrics(1, {"loss": 1.0})
    assert rows(tmp_path) == [{"stage": "train", "step": 1, "loss": 1.0}]
    assert gone.n_writes == 1


def test_log_txt_has_the_lines_of_the_screen(tmp_path: Path) -> None:
    table = Table("stage")
    table.add_column(Text("loss [nats a token]"))
    table.add_row("before", "1.5")
    for console in (piped(), Console(file=io.StringIO(), force_terminal=True, width=60)):
        with Log(tmp_path, LogConfig(), {}, console) as out:
            out.say("one [red] line")
            out.show(table)
            with out.progress("train", 4) as progress:
                progress.update(4, {"loss": 0.5})
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    first, second = text.split("--- ")[1::2], text.split(" ---\n")[1:]
    assert all(re.fullmatch(r"20\S+, minitune \S+", line.split(" ---")[0]) for line in first)
    for part in second:
        lines = part.splitlines()
        assert lines[0] == "one [red] line"
        assert "loss [nats a token]" in part
        assert "train 4/4  loss 0.5000  0:00 left" in lines
        assert "\x1b" not in part


def test_log_txt_ends_with_what_ended_the_run(tmp_path: Path) -> None:
    with pytest.raises(Stopped), Log(tmp_path, LogConfig(), {}, piped()):
        raise Stopped(7, Path("runs/x"))
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("\nstopped at step 7, saved in runs/x\n")


def test_a_short_loop_is_no_line_where_it_is_brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = [0.0], piped()
    monkeypatch.setattr(shown_progress, "monotonic", lambda: clock[0])
    with Log(tmp_path, LogConfig(), {}, console) as out, out.progress("before loss", 40, brief=True) as progress:
        for step in (10, 20):
            progress.update(step, {})
        clock[0] = 11.0
        progress.update(30, {})
    assert written(console) == "before loss 30/40  0:04 left\n"


def test_a_loop_inside_another_is_a_second_line_of_the_display(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with Log(tmp_path, LogConfig(), {}, console) as out, out.progress("train", 8) as outer:
        outer.update(1, {"loss": 1.0})
        with out.progress("train held-out", 50, brief=True) as inner:
            inner.update(20, {})
        outer.update(2, {"loss": 0.5})
    assert "train held-out" in written(console)
    assert "2/8" in written(console).rpartition("train")[2]
