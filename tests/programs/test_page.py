"""The page of a run: its figures are those of the run's files, and a browser draws it without a network."""

import html
import json
import re
import shutil
import subprocess
import threading
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minitune.__main__ import main
from minitune.cli.report import server_of
from minitune.data.table_facts import Lengths
from minitune.errors import InputError
from minitune.programs.data_facts import DataFacts, TableFacts
from minitune.programs.page.advice import advice
from minitune.programs.page.page import page, write_page
from minitune.programs.page.run_files import read_run
from minitune.programs.page.samples_part import columns
from minitune.programs.profiling.table import KindOfWork, StageProfile, write_profile
from minitune.programs.records import write_record
from support.programs import LORA, TRAIN, evaluation, run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "</script><script>document.title = 'taken'</script>"


def write_run(folder: Path, rows: list[dict], records: dict, program: str = 'name = "r"\n') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.toml").write_text(program, encoding="utf-8")
    (folder / "manifest.json").write_text(
        '{"starts": [{"time": "t", "versions": {"torch": "2"}}], "inputs": {}}', encoding="utf-8"
    )
    lines = [json.dumps({"stage": "train", **row}) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def figures(text: str) -> dict[str, dict]:
    """Figures of a page by their title."""
    found = [json.loads(html.unescape(content)) for content in re.findall(r'data-figure="([^"]*)"', text)]
    return {figure["layout"]["title"]["text"]: figure for figure in found}


class Balanced(HTMLParser):
    """Checks that every element that was opened is closed, in order."""

    VOID = ("meta", "br", "link", "img", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_curves_are_the_rows_of_the_run(tmp_path: Path, tiny: Path) -> None:
    train = TRAIN + 'evaluate = { data = "heldout", every = 2 }\n'
    run(tmp_path, tiny, evaluation("before") + LORA + train + evaluation("after"))
    text = (tmp_path / "p/report.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = figures(text)
    lengths = {"Lengths of train", "Lengths of heldout"}
    assert set(drawn) == {"Loss", "Learning rate", "Gradient norm", "Speed", "Memory", *lengths}
    facts = json.loads((tmp_path / "p/data.json").read_text(encoding="utf-8"))
    assert drawn["Lengths of train"]["traces"][0]["y"] == facts["tables"]["train"]["lengths"]["counts"]
    assert "of the 40 samples of heldout stand in train" in text
    loss, heldout = drawn["Loss"]["traces"]
    assert (loss["x"], loss["y"]) == ([1, 2, 3, 4], [row["loss"] for row in rows])
    measured = [row for row in rows if "heldout_loss" in row]
    assert (heldout["x"], heldout["y"]) == ([2, 4], [row["heldout_loss"] for row in measured])
    assert drawn["Memory"]["traces"][0]["y"] == [row["mem_bytes"] / 2**30 for row in rows]
    summary = json.loads((tmp_path / "p/summary.json").read_text(encoding="utf-8"))
    assert f"<td>{summary['after']['loss_nats']:.4f}</td>" in text
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert "train: train has 40 samples" in text


def test_answers_are_marked_where_they_differ_and_nothing_of_the_run_is_code(tmp_path: Path) -> None:
    sample = {"prompt": EVIL, "reference": "two pears & <b>", "answer": "two apples & <b>"}
    same = {**sample, "answer": sample["reference"]}
    records = {"before": {"loss_nats": 1.0, "samples": [sample]}, "after": {"loss_nats": 0.5, "samples": [same]}}
    text = page({EVIL: read_run(write_run(tmp_path / "r", [{"step": 1, "loss": "nan"}], records))}, script="x.js")
    assert "two <mark>apples</mark> &amp; &lt;b&gt;" in text
    assert '<span class="same">two pears &amp; &lt;b&gt;</span>' in text
    assert "<script>document.title" not in text
    assert figures(text)["Loss"]["traces"][0]["y"] == [None]  # a gap, because JSON has no NaN
    parser = Balanced()
    parser.feed(text)
    assert not parser.open


def test_missing_words_are_struck_out_and_a_legend_says_so(tmp_path: Path) -> None:
    sample = {"prompt": "p", "reference": "two red pears", "answer": "two pears"}
    text = page({"r": read_run(write_run(tmp_path / "r", [], {"after": {"loss_nats": 1.0, "samples": [sample]}}))}, script="x.js")
    assert "two <del>red </del>pears" in text
    assert "struck-out ones are missing" in text


def samples(answer: str) -> list[dict]:
    return [{"prompt": "p", "reference": "r", "answer": answer}]


def trained(best_step: int, state: str = "", step: int = 0) -> dict:
    others = {"other_answers": {"state": state, "step": step, "samples": samples("other")}} if state else {}
    return {"steps": 40, "best_step": best_step, "best_heldout_nats": 0.5, **others}


@pytest.mark.parametrize(
    ("train", "titles", "said"),
    [
        (
            trained(30, "last", 40),
            ["before", "after (best: step 30)", "last of train: step 40", "exported (best: step 30)"],
            "train: step 30 has the best held-out loss, 40 is the last step; the best of the two went on",
        ),
        (
            trained(30, "best", 30),
            ["before", "best of train: step 30", "after (last: step 40)", "exported (last: step 40)"],
            "train: step 30 has the best held-out loss, 40 is the last step; the last of the two went on",
        ),
        (
            trained(40),
            ["before", "after", "exported"],
            "train: the best held-out loss is that of the last step, 40",
        ),
        ({"steps": 40}, ["before", "after", "exported"], None),
    ],
)
def test_the_best_state_stands_between_before_and_after(tmp_path: Path, train: dict, titles: list[str], said: str | None) -> None:
    records: dict = {name: {"loss_nats": 1.0, "samples": samples(name)} for name in ("before", "after", "exported")}
    ordered = {"before": records["before"], "train": train, "after": records["after"], "exported": records["exported"]}
    run_files = read_run(write_run(tmp_path / "r", [], ordered))
    found = columns(run_files.typed)
    assert [column.title for column in found] == titles
    answers = ["other" if "of train" in title else title.partition(" ")[0] for title in titles]
    assert [column.samples[0].answer for column in found] == answers
    text = page({"r": run_files}, script="x.js")
    shown = re.findall(r'<div><p class="dim">([^<]*)</p><p>(.*?)</p></div>', text)
    assert [title for title, _ in shown] == titles
    assert said is None or said in text
    assert ("held-out loss" in text.partition("<h2>Samples</h2>")[2]) == (said is not None)
    parser = Balanced()
    parser.feed(text)
    assert not parser.open


def test_two_trainings_have_their_own_states(tmp_path: Path) -> None:
    record = {"loss_nats": 1.0, "samples": samples("a")}
    records = {"one": trained(30, "last", 40), "middle": record, "two": trained(20, "best", 20), "after": record}
    found = columns(read_run(write_run(tmp_path / "r", [], records)).typed)
    expected = ["middle (best: step 30)", "last of one: step 40", "best of two: step 20", "after (last: step 40)"]
    assert [column.title for column in found] == expected
    # nothing is measured between two trainings
    records.pop("middle")
    found = columns(read_run(write_run(tmp_path / "r", [], records)).typed)
    assert [column.title for column in found] == ["last of one: step 40", "best of two: step 20", "after (last: step 40)"]


ROWS = [{"step": i + 1, "loss": 2.0 - 0.05 * i, "grad_norm": 1.0} for i in range(30)]


@pytest.mark.parametrize(
    ("rows", "records", "said"),
    [
        (ROWS, {}, None),
        ([{**row, "loss": 2.0} for row in ROWS], {}, "train: the loss went from 2 to 2, so hardly anything was learned"),
        ([*ROWS, {**ROWS[-1], "step": 31, "grad_norm": 20.0}], {}, "train: the gradient's norm was 20 at step 31"),
        ([{**row, "skipped": float(row["step"] > 28)} for row in ROWS], {}, "train: 2 of 30 steps changed nothing"),
        ([{**row, "heldout_loss": 1.0 + 0.1 * row["step"]} for row in ROWS], {}, "train: the held-out loss rose from 1.1 to 4"),
        (ROWS, {"after": {"samples": [{"answer": "no end (cut)"}]}}, "after: 1 of the 1 answers shown were cut"),
        (ROWS, {"after": {"n_dropped": 7}}, "after: 7 rows were left out of the evaluation"),
        (
            ROWS,
            {"saved": {"merge_error": 0.34}},
            "saved: rounding lost up to 34% of a weight's change; saved.dtype=float32",
        ),
        (ROWS, {"saved": {"merge_error": 0.19}}, None),
        (ROWS, {"saved": {"merge_error": 0.34, "onto": "stored"}}, None),
    ],
)
def test_advice_says_what_is_odd_and_nothing_else(tmp_path: Path, rows: list[dict], records: dict, said: str | None) -> None:
    records = {name: {"loss_nats": 1.0, **record} for name, record in records.items()}
    for record in records.values():
        record["samples"] = [{"prompt": "p", "reference": "r", **sample} for sample in record.get("samples", ())]
    found = advice(read_run(write_run(tmp_path / "r", rows, records)))
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)


PROGRAM = 'name = "{name}"\nseed = 0\n[[stage]]\nop = "train"\noptimizer = {{ kind = "adamw", lr = {lr} }}\nbatch_size = {size}\n'


def test_runs_beside_each_other_show_what_differs_and_a_map_of_two_keys(tmp_path: Path) -> None:
    folders = []
    for lr in (1e-4, 1e-3):
        for size in (4, 8):
            rows = [{"step": 1, "loss": 1.0, "heldout_loss": lr * 1000 + size}]
            name = f"r{len(folders)}"
            text = PROGRAM.format(name=name, lr=lr, size=size)
            folders.append(write_run(tmp_path / name, rows, {}, text))
    assert main(["report", *map(str, folders), "--to", str(tmp_path / "all.html")]) == 0
    text = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "<th>train.optimizer.lr</th><th>train.batch_size</th>" in text
    assert text.index("<td>r0</td>") < text.index("<td>r2</td>") < text.index("<td>r1</td>") < text.index("<td>r3</td>")
    heat = figures(text)["Best loss"]["traces"][0]
    assert (heat["x"], heat["y"]) == (["0.0001", "0.001"], ["4", "8"])
    assert heat["z"] == [[4.1, 5.0], [8.1, 9.0]]
    assert [trace["name"] for trace in figures(text)["Loss"]["traces"]][:2] == ["r0 loss", "r1 loss"]


def test_the_adapters_of_a_sweep_have_a_table_and_a_map(tmp_path: Path) -> None:
    adapters = [
        {"point": {"lora.rank": rank, "optimizer.lr": lr}, "best_heldout_nats": rank * lr, "best_step": 3}
        for rank in (4, 8)
        for lr in (0.1, 0.2)
    ]
    rows = [{"step": 1, "adapter": i, "loss": float(i)} for i in range(4)]
    run_files = read_run(write_run(tmp_path / "r", rows, {"train": {"steps": 1, "adapters": adapters}}))
    text = page({"r": run_files}, script="x.js")
    assert "train: adapters of the sweep" in text
    assert figures(text)["Best loss"]["traces"][0]["z"] == [[0.4, 0.8], [0.8, 1.6]]
    assert [trace["name"] for trace in figures(text)["Loss"]["traces"]] == [f"adapter {i}" for i in range(4)]


def test_a_folder_that_is_no_run_and_a_place_that_is_taken_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"report: {tmp_path} holds no program.toml, expected the folder of a run" in capsys.readouterr().err
    one, two = (write_run(tmp_path / name, ROWS, {}, f'name = "{name}"\n') for name in "ab")
    monkeypatch.chdir(tmp_path)
    Path("report.html").write_text("mine", encoding="utf-8")
    assert main(["report", str(one), str(two)]) == 2
    assert "report: report.html exists, expected a new file; name one with --to" in capsys.readouterr().err
    assert Path("report.html").read_text(encoding="utf-8") == "mine"


def test_without_plotly_a_run_ends_well_and_says_what_is_missing(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise InputError("report: the package plotly is not installed, expected it; pip install 'minitune[report]'")

    monkeypatch.setattr("minitune.programs.page.page.library", missing)
    run(tmp_path, tiny, LORA + TRAIN)
    assert "no report.html: report: the package plotly is not installed" in capsys.readouterr().out


def test_watch_serves_the_page_as_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ROWS[:2], {})
    (folder / "summary.json").unlink()
    server = server_of(folder, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        text = urllib.request.urlopen(address).read().decode()
        assert figures(text)["Loss"]["traces"][0]["x"] == [1, 2]
        assert '<meta http-equiv="refresh" content="10">' in text
        write_run(folder, ROWS, {})
        text = urllib.request.urlopen(address).read().decode()
        assert len(figures(text)["Loss"]["traces"][0]["x"]) == 30
        assert "http-equiv" not in text
        assert urllib.request.urlopen(f"{address}/plotly.js").read().startswith(b"/**\n* plotly.js")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/../etc/passwd")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_full_run(folder: Path) -> Path:
    """Write a run that has everything that a page shows, and figures that are odd."""
    rows = [{**row, "lr": 1e-3, "mem_bytes": 2**30, "tokens_per_second": 5.0, "loss": 2.0} for row in ROWS]
    rows[20] |= {"grad_norm": 50.0, "heldout_loss": 1.5}
    records = {
        "before": {"loss_nats": 2.0, "samples": samples("long and wrong (cut)")},
        "train": trained(30, "last", 40),
        "after": {"loss_nats": 1.0, "exact_match": 0.25, "samples": samples("r")},
    }
    write_run(folder, rows, records)
    lengths = Lengths(20, [3, 4], 12.0, 12.0, 30)
    few = TableFacts("t.jsonl", "instruct", 64, 7, 1000, 10, 7, {}, lengths, None, None)
    write_record(folder / "data.json", DataFacts({"train": few}))
    work = KindOfWork("matrix products", 0.75, 0.75, 12, 2**20, 2**19), KindOfWork("attention", 0.25, 0.25, 3, 0, 0)
    write_profile(folder, "train", StageProfile((10, 12), 1.0, False, 2**19, work, "profile/train-steps-10-12.json.gz"))
    return folder


SHOWN = (
    *("Loss", "Learning rate", "Gradient norm", "Speed", "Memory", "Lengths of train"),  # figures
    *("Stages", "exact match", "25.0%", "at step"),
    *("Samples", "before", "after (best: step 30)", "last of train: step 40"),
    *("Where time and memory went", "75% of it is matrix products and 25% attention", "profile/train-steps-10-12.json.gz"),
    *("torch 2", "program.toml", 'name = "r"'),
    "the loss went from 2 to 2, so hardly anything was learned",
    "the gradient's norm was 50 at step 21",
    "1 of the 1 answers shown were cut at max_new_tokens",
    "1.0% of the tokens of train are trained; short answers to long prompts learn slowly",
)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [1280, 600])
def test_a_browser_shows_everything_and_draws_every_figure_within_its_box(tmp_path: Path, width: int) -> None:
    path = write_page(read_run(write_full_run(tmp_path / "r")))
    words = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--window-size={width},900", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
    drawn = re.findall(r'<svg class="main-svg"[^>]*width="([\d.]+)"', dom)
    assert dom.count('class="plot js-plotly-plot"') == 6
    assert len(drawn) >= 6
    assert all(0 < float(size) <= width for size in drawn)
    seen = html.unescape(re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", "\n", dom, flags=re.DOTALL))
    assert [text for text in SHOWN if text not in seen] == []
