"""Data sets of the Hub in programs: fetched once, checked, hashed into the manifest, and there without the network."""

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitune.__main__ import main
from minitune.cli.download import download
from minitune.data.readers import rows_with_location
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.programs import manifest, program, save_paths
from minitune.programs.data_paths import data_places, located
from support.hub_server import COMMIT, Hub, contents
from support.programs import SHIPPED

REPO = "somebody/tiny-rows"
ROWS = [{"question": f"{i} plus {i}?", "answer": f"{2 * i}."} for i in range(90)]
README = b"""---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/part-*}
  - {split: test, path: plain/last.jsonl}
- config_name: hard
  data_files: hard.jsonl
---
# Rows
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "README.md": README,
    "plain/part-0.parquet": parquet(ROWS[:50]),
    "plain/part-1.parquet": parquet(ROWS[50:]),
    "plain/last.jsonl": jsonl(ROWS[:3]),
    "hard.jsonl": jsonl(ROWS[3:5]),
    "build.py": b"raise SystemExit",
    "../out.jsonl": b"{}",
}


@pytest.fixture
def cache(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    server.data_sets = {REPO: dict(FILES)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minitune" / "hub"


def checked(*words: str) -> int:
    return main(["check", str(SHIPPED["sft"]), *words])


def test_check_fetches_what_a_program_names_and_nothing_else(
    server: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(f"data.train.path=hf:{REPO}", f"data.heldout.path=hf:{REPO}/plain:test") == 0
    shown = capsys.readouterr().out
    n_bytes = len(FILES["plain/part-0.parquet"]) + len(FILES["plain/part-1.parquet"])
    assert f"data: hf:{REPO} at {COMMIT[:12]}: 2 files, {n_bytes / 1024:.1f} KiB\n" in shown
    assert "(instruct: instruction = question, output = answer)" in shown
    kept = {name: FILES[name] for name in ("README.md", "plain/part-0.parquet", "plain/part-1.parquet", "plain/last.jsonl")}
    assert contents(cache / "somebody--tiny-rows" / COMMIT) == kept
    assert sorted(server.fetched()) == sorted(kept)  # each once
    source = Source(f"hf:{REPO}", "instruct", 64)
    assert [row for _, row in rows_with_location(located(source))] == ROWS
    assert [path.parts[-2:] for path in data_places(f"hf:{REPO}/hard")] == [(COMMIT, "hard.jsonl")]


def test_the_manifest_has_the_hash_of_every_file(server: Hub, cache: Path) -> None:
    loaded = program.load(SHIPPED["sft"], [f"data.train.path=hf:{REPO}"])
    save_paths.check(loaded)
    records = manifest.input_records(loaded)
    for name in ("plain/part-0.parquet", "plain/part-1.parquet"):
        assert records[f"hf:{REPO}/{name}"]["sha256"] == hashlib.sha256(FILES[name]).hexdigest()
    # what a run writes down is the name, not a place of this machine
    assert f'path = "hf:{REPO}"' in program.resolved(loaded)


def test_check_takes_what_is_newest_and_without_the_network_what_was_fetched(
    server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.train.path=hf:{REPO}"]
    assert checked(*words) == 0
    server.commit = "decade" + 34 * "0"
    server.data_sets[REPO]["plain/part-1.parquet"] = parquet(ROWS[60:])
    server.log.clear()
    data_places(f"hf:{REPO}")  # what comes after check asks nothing
    assert server.log == []
    assert checked(*words) == 0
    assert f"hf:{REPO} at decade000000: 2 files" in capsys.readouterr().out
    assert len(list(rows_with_location(located(Source(f"hf:{REPO}", "instruct", 64))))) == 80
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert checked(*words) == 0
    note = f"fetched earlier (hub: {REPO} can't be fetched with HF_HUB_OFFLINE set, expected a network; "
    assert note in capsys.readouterr().out.replace("\n", "")
    (cache / "somebody--tiny-rows" / server.commit / "plain/part-0.parquet").unlink()
    assert checked(*words) == 2
    assert f"hub: {REPO} can't be fetched with HF_HUB_OFFLINE set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "refusal", "message"),
    [
        (f"hf:{REPO}/plain:tset", None, f"{REPO}/plain has no split 'tset', expected one of train, test; did you mean 'test'"),
        (f"hf:{REPO}/hrad", None, f"{REPO} has no config 'hrad', expected one of plain, hard; did you mean 'hard'"),
        (f"hf:{REPO}@v9", None, f"{REPO} has no revision 'v9', expected a branch, a tag or a commit; see http"),
        ("hf:somebody/tiny-row", None, f"expected OWNER/NAME of a data set; did you mean '{REPO}'"),
        ("hf:squad", None, "'hf:squad' is no name of a data set, expected hf:OWNER/NAME"),
        (f"hf:{REPO}", (403, "GatedRepo"), f"/datasets/{REPO}, then set HF_TOKEN to your token"),
        (f"hf:{REPO}:train", (401, ""), "answered 401, expected its files; set HF_TOKEN to a token that may read it"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_of_check(
    name: str, refusal: Any, message: str, server: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal = refusal
    assert checked(f"data.train.path={name}", "data.train.format=instruct") == 2
    err = capsys.readouterr().err
    assert err.startswith("hub: ")
    assert message in err
    assert err.count("\n") == 1


def test_without_the_package_the_message_names_the_extra(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"huggingface_hub is not installed.*pip install 'minitune\[hf\]'"):
        data_places(f"hf:{REPO}")


def test_download_brings_a_split_by_hand_and_says_how_to_use_it(
    server: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows"
    assert download(["--dataset", REPO, "--to", str(folder)]).code == 0
    assert set(contents(folder)) == {"README.md", "plain/part-0.parquet", "plain/part-1.parquet"}
    shown = capsys.readouterr().out
    assert shown.startswith(f"{folder}: {REPO} at {COMMIT[:12]}, 2 files of rows, ")
    word = f'data.train.path=["{folder}/plain/part-0.parquet", "{folder}/plain/part-1.parquet"]'
    assert f"'{word.partition('=')[2]}'" in shown
    assert program.load(SHIPPED["sft"], [word]).data["train"].format == "instruct"
    assert download([f"{REPO}/hard", "--dataset", "--revision", "main", "--to", str(folder)]).code == 0
    assert f"data.train.path={folder}/hard.jsonl\n" in capsys.readouterr().out
    server.damaged = {"plain/part-0.parquet"}
    with pytest.raises(InputError, match=rf"part-0\.parquet arrived with another SHA-256 than {REPO} lists"):
        download(["--dataset", REPO, "--to", str(tmp_path / "other")])


def test_a_name_without_its_hf_is_told_the_spelling() -> None:
    with pytest.raises(InputError, match=r'a/b is no file here, .*; a data set of the Hugging Face Hub is "hf:a/b"'):
        Source("hf://datasets/a/b", "text", 8).files()
    with pytest.raises(InputError, match=r"which a program fetches, .*run python -m minitune download --dataset a/b:test --to F"):
        Source("hf:a/b:test", "text", 8).files()
