"""Paths that a program names: those that no file can have are told."""

from pathlib import Path

import pytest

from minitune.errors import InputError
from minitune.io import paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a\0b", "holds a NUL character"),
        ("run/a\0b", "holds a NUL character"),
        ("configs/\0", "holds a NUL character"),
        ("x" * 256, "has a name of more than 255 bytes"),
        ("here/" + "\u00e4" * 128, "has a name of more than 255 bytes"),
        ('[{"role": "user"}]' * 10**5, "has a name of more than 255 bytes"),
    ],
)
def test_a_path_that_no_file_can_have_is_told(path: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^paths: .{{1,130}} {message}, expected a path; "):
        paths.locate(path, Path("runs/x"))


def test_a_name_of_255_bytes_is_a_path() -> None:
    assert paths.locate("x" * 255) == Path("x" * 255)
