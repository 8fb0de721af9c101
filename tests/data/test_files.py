"""Files of every kind that people bring give the same rows, or the sentence that says what they are."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitune.data.files import data_files
from minitune.data.readers import first_row, read_rows, require_rows, rows_with_location
from minitune.data.source import MixtureComponent, Source, column
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
    "indented.jsonl": lambda path: path.write_text("\n\n".join(json.dumps(row, indent=4) for row in ROWS), "utf-8"),
    "list_in.txt": lambda path: path.write_text(json.dumps(ROWS), "utf-8"),
    "utf16.jsonl": lambda path: path.write_text(LINES, "utf-16"),
    "utf16_be.json": lambda path: path.write_bytes(b"\xfe\xff" + json.dumps(ROWS).encode("utf-16-be")),
    "utf32.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode("utf-32"))),
    "utf16.csv": lambda path: write_csv(path, encoding="utf-16"),
    "utf16.tsv": lambda path: write_csv(path, "\t", encoding="utf-16"),
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
    assert source.with_paths(lambda path: [Path("/root") / path]).path == source.path
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
    ("a.csv", LINES.encode("utf-16-be"), "is text in UTF-16 without its byte order mark, expected a jsonl, .* save it as UTF-8"),
    ("a.jsonl", LINES.encode("utf-16")[:-1], "begins as UTF-16 and is none at byte 1.., expected UTF-16 to its end; save it"),
    ("a.csv", bytes(range(32, 200)) + b"\0\1\0\2", r"holds the byte 0 \(at byte 168\), as no text does, expected"),
    (
        "a.csv",
        b"text,n\na,1\n" + "caf\xe9,2\n".encode("latin-1"),
        r":3 holds the byte 0xe9 \(byte 4 of the line\), which is no UTF-8 but 'é' in Windows-1252 .*, expected UTF-8; "
        "save the file as UTF-8, as iconv -f WINDOWS-1252",
    ),
    (
        "a.jsonl",
        '{"text": "b"}\n{"text": "\u201cb\u201d"}'.encode("cp1252"),
        r":2 holds the byte 0x93 \(byte 11 of .* but '“'",
    ),
    (
        "a.json",
        '[{"text": "b"},\n {"text": "\xfc"}]'.encode("cp1252"),
        r":2 holds the byte 0xfc \(byte 11 of ",
    ),
    ("a.txt", b"pears\nand \x81", r":2 holds the byte 0x81 \(byte 5 of the line\), which is no UTF-8, expected UTF-8; save the"),
    (
        "a.jsonl",
        b"PK\x03\x04rest",
        r"is a zip archive or a document of an office program \(xlsx.*; unpack it, save a sheet",
    ),
    (
        "a.xls",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        r"is a document of an old office program \(xls, doc\), .*; save a sheet",
    ),
    ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", "is a PDF, expected .*; take its text out"),
    ("a.jsonl", b"\n<!DOCTYPE html>\n<html>", r"is a web page \(HTML\), .*; fetch the file itself"),
    ("a.html", b"<html lang=en>", r"is a web page \(HTML\)"),
    ("a.xml", b'\xef\xbb\xbf<?xml version="1.0"?>', "is XML, .*; write its rows as jsonl"),
    ("a.tar", bytes(257) + b"ustar", "is a tar archive, .*; unpack it"),
    ("a.yaml", b"- text: a\n", r"begins with no JSON, and is of no kind that ends in \.yaml, .*; write its rows as jsonl"),
    ("a.txt", b" \n", "holds no text, expected some"),
    (
        "a.jsonl",
        b'{\n  "text": "a"\n}\n{\n  "text" "b"\n}',
        r":5 Expecting ':' delimiter, .* \(this one begins in line 4\)",
    ),
    ("a.jsonl", b'{\n  "text": NaN\n}', ":1 holds NaN, which is no JSON"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, not the file itself"),
    ("a.jsonl", b'{"text": "a", "score": NaN}\n', ":1 holds NaN, which is no JSON, .* write null or leave the key out"),
    ("a.jsonl", b'{"text": "a", "score": -Infinity}\n', ":1 holds -Infinity, which is no JSON"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', ":1 holds half of a surrogate pair, which is no character"),
    ("a.csv", b"text,n\na,1\nb\n", ":3 has 1 fields, expected the 2 of the first line"),
    ("a.csv", b"text\n\xff\xfeb\n", ":2 holds the byte 0xff"),
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


def test_a_file_of_plain_text_is_one_text_whatever_is_in_it(tmp_path: Path) -> None:
    for name, text in (("a.txt", "Two\n\n[apples] <b>\n"), ("b.md", "[1] pears\n\n# é")):
        (tmp_path / name).write_text(text, "utf-8")
        assert list(read_rows(tmp_path / name)) == [(1, {"text": text})]
        with pytest.raises(InputError, match=rf'{name}:1 has no "messages" \(only text\), .* or write format = "text"$'):
            column(dict(first_row(tmp_path / name)), "messages", (list,), Source("a", "chat", 8), f"{name}:1")


def test_rows_of_indented_objects_are_named_by_the_line_that_they_begin_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, indent=1) + "\n \n" for row in ROWS), "utf-8")
    assert [number for number, _ in read_rows(tmp_path / "a.jsonl")] == [1, 5, 9]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("key", ["output", "system", "weight", "history", "tools"])
def test_a_column_that_no_row_has_is_refused_with_near_names(name: str, key: str, tmp_path: Path) -> None:
    rows = [{"instruction": "two", "output": "pears", "sys_prompt": None}, {"instruction": "two", "late": "b"}]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(
            pa.Table.from_pylist([{**dict.fromkeys(["instruction", "output", "sys_prompt", "late"]), **row} for row in rows]),
            path,
        )
    elif name.endswith("csv"):
        path.write_text("instruction,output,sys_prompt,late\ntwo,pears,,\n,,,b\n", "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for column_name in ("sys_prompt", "late", "" if key == "weight" else "late"):
        require_rows(Source(str(path), "instruct", 8, columns={key: column_name}))  # some row has it
    wrong = Source(str(path), "instruct", 8, columns={"instruction": "instruction", key: "sys_promt"})
    found = r"no column 'sys_promt' in any row \(only instruction, output, sys_prompt, late\)"
    with pytest.raises(InputError, match=rf"^data: .*{name} has {found}, expected .* {key} = \"sys_promt\" .*; did you mean"):
        require_rows(wrong)
    far = msgspec.structs.replace(wrong, columns={key: "xyz"})
    with pytest.raises(InputError, match=r"names; correct the name, or leave it out$"):
        require_rows(far)


QA = {"question": "a", "answer": "b"}
NAMED = 'columns = { instruction = "question", output = "answer" }'
ADVICE: list[tuple[Any, str, dict[str, Any], str]] = [
    ("instruct", "instruction", QA, f"; write {NAMED}"),
    ("chat", "messages", QA, f'; name its columns with columns = {{ messages = "..." }}, or write format = "instruct", {NAMED}'),
    (
        "pairs",
        "chosen",
        QA,
        '; name its columns with columns = { prompt = "...", chosen = "...", rejected = "..." }, or write',
    ),
    ("instruct", "output", {"messages": []}, 'or write format = "chat"'),
    ("instruct", "output", {"instruction": "a", "text": "b"}, '; name the column with columns = { output = "..." }'),
    ("text", "text", {"v": 1, "data": [{"text": "a"}]}, '; its rows are the list "data": write that list alone into the file'),
    ("instruct", "output", {"output": {"0": "a"}}, 'a string; write rows: to_json(FILE, orient="records", lines=True)'),
]


@pytest.mark.parametrize(("format", "name", "row", "advice"), ADVICE)
def test_a_row_of_other_columns_is_told_what_to_type(format: Any, name: str, row: dict[str, Any], advice: str) -> None:
    with pytest.raises(InputError, match=re.escape(advice)):
        column(row, name, (str,), Source("a", format, 8), "a:1")


def test_parquet_with_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    offsets, text = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet:1 .*utf-8.*expected a parquet file"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "written", ["a/b-2.5", "hub:a/b-2.5", "hf://datasets/a/b-2.5", "https://huggingface.co/datasets/a/b-2.5"]
)
def test_a_name_of_the_hub_is_told_how_to_get_it(written: str) -> None:
    message = r'is no file here, .*; a data set of the Hugging Face Hub is "hf:a/b-2.5"$'
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
