"""Files of every kind that people bring give the same rows, or the sentence that says what they are."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitune.data.files import data_files
from minitune.data.readers import read_rows, rows_with_location
from minitune.data.source import MixtureComponent, Source
from minitune.errors import InputError

ROWS = [{"text": 'two, "apples"\nand é'}, {"text": "pears"}, {"text": ""}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path: Path, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["text", "n"], *([row["text"], "1"] for row in ROWS)])


def write_zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(LINES.encode())


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text(LINES, "utf-8"),
    "bom.jsonl": lambda path: path.write_text(LINES, "utf-8-sig"),
    "no_suffix": lambda path: path.write_text(LINES, "utf-8"),
    "a.JSON": lambda path: path.write_text(json.dumps(ROWS), "utf-8"),
    "bom.json": lambda path: path.write_text(json.dumps(ROWS), "utf-8-sig"),
    "list.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent=2), "utf-8"),
    "one_line.jsonl": lambda path: path.write_text(json.dumps(ROWS), "utf-8"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.json.GZ": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.jsonl.zst": write_zstd,
    "a.PARQUET": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "no_suffix_parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": write_arrow,
    "a.csv": write_csv,
    "bom.csv": lambda path: write_csv(path, encoding="utf-8-sig"),
    "semicolons.csv": lambda path: write_csv(path, ";"),
    "a.tsv": lambda path: write_csv(path, "\t"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    rows = [row for _, row in read_rows(tmp_path / name)]
    assert [{"text": row["text"]} for row in rows] == ROWS


def test_a_folder_of_shards_is_one_table(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert [row for _, row in read_rows(tmp_path / "saved")] == ROWS
    shards = tmp_path / "hub" / "data"
    shards.mkdir(parents=True)
    for n, row in enumerate(ROWS):
        pq.write_table(pa.Table.from_pylist([row]), shards / f"train-0000{n}-of-00003.parquet")
    (tmp_path / "hub" / "README.md").write_text("# data", "utf-8")
    for path in (tmp_path / "hub", shards / "train-*.parquet", tmp_path / "hub" / "**" / "train-*"):
        located = list(rows_with_location(Source(str(path), "text", 8)))
        assert [row for _, row in located] == ROWS
        assert located[1][0] == f"{shards / 'train-00001-of-00003.parquet'}:1"
    pq.write_table(pa.Table.from_pylist(ROWS), shards / "test-00000-of-00001.parquet")
    with pytest.raises(
        InputError, match=r"data: .*hub holds the parts test, train of a data set, expected one of them; name its"
    ):
        data_files(tmp_path / "hub")


def test_a_list_of_paths_is_one_table_whose_rows_know_their_files(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    places = [tmp_path / "b.jsonl", tmp_path / "shards" / "c.csv", tmp_path / "shards" / "d.csv"]
    for name, row in zip(places, ROWS, strict=True):
        if name.suffix == ".csv":
            with name.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["text", "n"], [row["text"], "1"]])
        else:
            name.write_text(json.dumps(row), "utf-8")
    written = f"""
path = ["{places[0]}", "{tmp_path}/shards/*.csv"]
format = "text"
seq_len = 8
"""
    source = msgspec.toml.decode(written, type=Source)
    located = list(rows_with_location(source))
    assert [row["text"] for _, row in located] == [row["text"] for row in ROWS]
    assert [where.rpartition(":")[0] for where, _ in located] == [str(place) for place in places]
    assert source.with_paths(lambda path: Path("/root") / path).path == source.path
    keys = ["data.train.path[0]", "data.train.path[1]"]
    assert source.paths_by_key("train") == dict(zip(keys, source.path, strict=True))


def test_a_list_of_paths_is_refused_where_it_can_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', "utf-8")
    twice = Source((str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")), "text", 8)
    with pytest.raises(InputError, match=r"data: .*a.jsonl is meant twice by path .*, expected each file once"):
        twice.files()
    for path in ((), "", ("a.jsonl", "")):
        with pytest.raises(InputError, match=r"^data: path names no file, expected a file, a glob, a folder or a list"):
            Source(path, "text", 8)
    with pytest.raises(InputError, match=r"^data: path names no file"):
        Source("a", "text", 8, mix=(MixtureComponent((), 0.1),))


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.jsonl", LINES.encode("utf-16"), "is text in UTF-16, expected a jsonl, .* save it as UTF-8"),
    ("a.csv", LINES.encode("utf-16-be"), "is text in UTF-16, expected a jsonl, .* save it as UTF-8"),
    ("a.jsonl", b"PK\x03\x04rest", "is a zip archive or a spreadsheet"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, not the file itself"),
    ("a.jsonl", b'{"text": "a", "score": NaN}\n', ":1 holds NaN, which is no JSON, .* write null or leave the key out"),
    ("a.jsonl", b'{"text": "a", "score": -Infinity}\n', ":1 holds -Infinity, which is no JSON"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', ":1 holds half of a surrogate pair, which is no character"),
    ("a.csv", b"text,n\na,1\nb\n", ":3 has 1 fields, expected the 2 of the first line"),
    ("a.csv", b"text\n\xff\xfeb\n", "expected csv in UTF-8"),
    ("a.csv", b"text,n,text\na,1,b\n", ":1 names the column 'text' twice, expected each once"),
    ("a.csv", b"text\n", "holds no row, expected names of columns and rows"),
    ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "expected a gzip file; fetch the file again"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfdxxxxxxx", "expected a zstd file; fetch the file again"),
    ("a.arrow", b"no arrow at all", "expected an arrow file; fetch the file again"),
    ("a.parquet", b"no parquet at all", "expected a parquet file; fetch the file again"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_no_data_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^data: .*{name}.*({message})"):
        list(read_rows(tmp_path / name))


def test_parquet_with_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    offsets, text = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet:1 .*utf-8.*expected a parquet file"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("written", ["a/b-2.5", "hub:a/b-2.5", "hf://datasets/a/b-2.5"])
def test_a_name_of_the_hub_is_told_how_to_get_it(written: str) -> None:
    message = r"is no file here, .*run hf download a/b-2.5 --repo-type dataset --local-dir FOLDER, and name the FOLDER"
    with pytest.raises(InputError, match=message):
        Source(written, "text", 8).files()


def test_no_file(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "x-*.jsonl", "matches no file, expected a jsonl"),
        (tmp_path / "x.jsonl", "is no file, expected a jsonl"),
        (tmp_path, "holds no file with rows, expected a jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_rows(path))
