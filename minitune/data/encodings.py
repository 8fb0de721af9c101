"""Encodings of text files: UTF-8 is read, UTF-16 and UTF-32 where their mark says so, and what is
none of them is named.
"""

from pathlib import Path

from minitune.errors import InputError

UTF8_BOM = b"\xef\xbb\xbf"
# Byte order marks; that of UTF-32 begins with that of UTF-16, so it comes first.
MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def marked_encoding(start: bytes) -> str | None:
    """Encoding other than UTF-8 that the first bytes of a file are the mark of."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), None)


def as_utf8(content: bytes, encoding: str, path: Path) -> bytes:
    """Text in UTF-8 of a whole file in another encoding."""
    try:
        return content.decode(encoding).encode()
    except UnicodeDecodeError as error:
        name = encoding.upper()
        raise InputError(
            f"data: {path} begins as {name} and is none at byte {error.start}, expected {name} to "
            "its end; save it as UTF-8"
        ) from None


def refuse_binary(start: bytes, path: Path, expected: str) -> None:
    """InputError for the start of a file that holds the byte 0, which no text in UTF-8 has."""
    if 0 not in start:
        return
    # Letters of most languages have one byte of two that is 0.
    zeros = [start[parity::2].count(0) for parity in (0, 1)]
    if min(zeros) == 0 and sum(zeros) > len(start) // 16:
        found = "is text in UTF-16 without its byte order mark"
        raise InputError(f"data: {path} {found}, expected {expected}; save it as UTF-8")
    found = f"holds the byte 0 (at byte {start.index(0)}), as no text does"
    raise InputError(f"data: {path} {found}, expected {expected}; correct the path")


def decoded(content: bytes, path: Path) -> str:
    """Text of a whole file; InputError with the line that is no UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        first = content.rfind(b"\n", 0, error.start) + 1
        number = 1 + content.count(b"\n", 0, first)
        found, remedy = not_utf8(content[first:].partition(b"\n")[0]) or (str(error), "save it")
        raise InputError(f"data: {path}:{number} {found}, expected UTF-8; {remedy}") from None


def not_utf8(text: bytes) -> tuple[str, str] | None:
    """(what was found, what to do) for bytes that are no UTF-8, None for those that are."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        byte = text[error.start : error.start + 1]
        found = f"holds the byte 0x{byte.hex()} (byte {error.start + 1} of the line)"
        letter = byte.decode("cp1252", "ignore")
        if not letter:
            return f"{found}, which is no UTF-8", "save the file as UTF-8"
        return (
            f"{found}, which is no UTF-8 but {letter!r} in Windows-1252 and its kin",
            "save the file as UTF-8, as iconv -f WINDOWS-1252 -t UTF-8 does",
        )
    return None
