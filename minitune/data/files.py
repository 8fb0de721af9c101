"""Data files: which of them a path means, what they hold, and their bytes without compression."""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, cast

from minitune.data.encodings import UTF8_BOM, as_utf8, marked_encoding, refuse_binary
from minitune.errors import InputError

FileKind = Literal["lines", "list", "objects", "text", "csv", "tsv", "parquet", "arrow"]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
COMPRESSED = (".gz", ".zst")
EXPECTED = "a jsonl, json, csv, tsv, parquet or arrow file"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# First bytes of what is no data file, what it is, and what to do with it.
OTHERS = {
    rb"PK\x03\x04": (
        "is a zip archive or a document of an office program (xlsx, docx, ods)",
        "unpack it, save a sheet as csv, and a text as txt",
    ),
    rb"\xd0\xcf\x11\xe0": (
        "is a document of an old office program (xls, doc)",
        "save a sheet as csv, and a text as txt",
    ),
    rb"%PDF-": ("is a PDF", "take its text out, and save that as txt or jsonl"),
    rb"\{\\rtf": ("is a document (rtf)", "save its text as txt"),
    rb"(?i:\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b)": (
        "is a web page (HTML)",
        "fetch the file itself, which the page may link to, or save the page's text as txt",
    ),
    rb"\s*<\?xml\b": ("is XML", "write its rows as jsonl"),
    rb"version https://git-lfs": (
        "is a git-lfs pointer, not the file itself",
        "run git lfs pull",
    ),
    rb"\x80[\x02-\x05]": ("is a pickle, which can run code", "write it as jsonl"),
    rb"\x93NUMPY": ("is a NumPy array", "write it as jsonl"),
    rb"SQLite format 3\x00": ("is a SQLite database", "save a table of it as csv"),
    rb".{257}ustar": ("is a tar archive", "unpack it"),
    rb"BZh[1-9]|\xfd7zXZ|7z\xbc\xaf|Rar!": (
        "is an archive or compressed (bzip2, xz, 7z, rar)",
        "unpack it, or compress it as gz or zst",
    ),
}
# A data set of the Hub as other tools name it: OWNER/NAME alone, or behind the start of an address.
HUB_NAME = re.compile(
    r"(?:hub:|hf:/+(?:datasets/)?|https?:/+huggingface\.co/datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)$"
)
# Files that describe a data set and lie beside its rows.
DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")
# Words in the names of files that belong to different parts of a data set.
SPLITS = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def data_files(path: Path) -> list[Path]:
    """Files that a path means: itself, those that its pattern matches, or those of its folder.

    InputError if there is none, and for a folder that holds several parts of a data set.
    """
    if path.is_dir():
        return _files_of_folder(path)
    on_hub = HUB_NAME.match(str(path))
    if on_hub and not path.exists() and _suffix(path) not in SUFFIXES:
        raise InputError(
            f"data: {path} is no file here, expected {EXPECTED}; "
            f'a data set of the Hugging Face Hub is "hf:{on_hub[1]}"'
        )
    if str(path).startswith("hf:"):
        fetch = f"python -m minitune download --dataset {str(path)[3:]} --to FOLDER"
        found = f"data: {path} is a data set of the Hugging Face Hub, which a program fetches"
        raise InputError(f"{found}, expected {EXPECTED}; run {fetch}, and name its files")
    if path.exists() or not re.search(r"[*?\[]", str(path)):
        return [path]
    root = Path(path.anchor or ".")
    pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
    files = sorted(file for file in root.glob(pattern) if file.is_file())
    if not files:
        raise InputError(f"data: {path} matches no file, expected {EXPECTED}; correct the pattern")
    return files


def _files_of_folder(folder: Path) -> list[Path]:
    """Data files in a folder and the folders below it, such as the shards of a data set."""
    files: list[Path] = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and is_data_file(file.name):
            files.append(file)
    if not files:
        found_nothing = f"data: {folder} holds no file with rows"
        raise InputError(f"{found_nothing}, expected {EXPECTED}; correct the path")
    found = [SPLITS.search(file.relative_to(folder).as_posix()) for file in files]
    parts = sorted({match[1].lower() for match in found if match})
    if len(parts) > 1:
        raise InputError(
            f"data: {folder} holds the parts {', '.join(parts)} of a data set, "
            f'expected one of them; name its files, as in path = "{folder}/**/{parts[-1]}*"'
        )
    return files


def is_data_file(name: str) -> bool:
    """Return True if a file holds rows, as far as its name says."""
    path = Path(name)
    return _suffix(path) in SUFFIXES and path.name not in DESCRIPTIONS


def _suffix(path: Path) -> str:
    """Suffix of a file in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def kind_of(path: Path) -> FileKind:
    """Kind of a data file, by its first bytes where they say it, else by its suffix.

    InputError for a file that is none.
    """
    suffix = _suffix(path)
    with opened(path) as file:
        start = file.read(4096)
    for magic, (found, advice) in OTHERS.items():
        if re.match(magic, start.removeprefix(UTF8_BOM), re.DOTALL):
            raise InputError(f"data: {path} {found}, expected {EXPECTED}; {advice}")
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"ARROW1") or suffix == ".arrow":
        return "arrow"
    if suffix == ".parquet":
        return "parquet"
    refuse_binary(start, path, EXPECTED)
    if suffix == ".csv":
        return "csv"
    if suffix == ".tsv":
        return "tsv"
    return _kind_of_text(start.removeprefix(UTF8_BOM), suffix, path)


def _kind_of_text(start: bytes, suffix: str, path: Path) -> FileKind:
    """Kind of a file of JSON, whatever it is called, or of plain text.

    JSON is a list of objects, an object a line, or objects that go over lines.
    """
    if re.match(rb"\s*\{[ \t]*\r?\n", start):
        return "objects"
    begins_list = re.match(rb"\s*\[\s*(\{|\]|$)", start)
    if begins_list or (suffix == ".json" and start.lstrip().startswith(b"[")):
        return "list"
    # Lines that hold lists are refused one by one.
    if start.lstrip().startswith(b"{") or suffix in ("", ".jsonl", ".json"):
        return "lines"
    if suffix in TEXT_SUFFIXES:
        return "text"
    found = f"data: {path} begins with no JSON, and is of no kind that ends in {suffix}"
    raise InputError(f"{found}, expected {EXPECTED}; write its rows as jsonl")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a data file as bytes, without its compression; text in UTF-16 comes as UTF-8.

    InputError if there is no such file, and for a damaged archive.
    """
    if not path.is_file():
        raise InputError(f"data: {path} is no file, expected {EXPECTED}; correct the path")
    try:
        with path.open("rb") as raw:
            start = raw.read(4)
            raw.seek(0)
            with _decompressed(raw, start, path) as file:
                start = file.read(4)
                file.seek(0)
                encoding = marked_encoding(start)
                yield file if encoding is None else BytesIO(as_utf8(file.read(), encoding, path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"data: {path} {error}"
        raise InputError(f"{found}, expected a gzip file; fetch the file again") from None


@contextmanager
def _decompressed(raw: BinaryIO, start: bytes, path: Path) -> Iterator[BinaryIO]:
    if start.startswith(GZIP):
        with gzip.GzipFile(fileobj=raw) as file:
            yield cast(BinaryIO, file)
    elif start == ZSTD:
        yield BytesIO(_zstd(raw, path))
    else:
        yield raw


def _zstd(raw: BinaryIO, path: Path) -> bytes:
    """Content of a zstd file; InputError without pyarrow, which reads it, and for a damaged one."""
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(
            f"data: {path} is compressed with zstd and needs the package pyarrow, which is not "
            "installed; pip install 'minitune[parquet]'"
        ) from None
    try:
        with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as stream:
            return stream.read()
    except (pa.ArrowException, OSError) as error:
        found = f"data: {path} {error}"
        raise InputError(f"{found}, expected a zstd file; fetch the file again") from None
