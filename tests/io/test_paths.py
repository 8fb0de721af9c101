"""Paths: those that no file can have, and the cache where its own place can't be written."""

import os
import tempfile
from pathlib import Path

import pytest

from minitune.errors import InputError
from minitune.io import paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a\0b", "holds a zero byte"),
        ("run/a\0b", "holds a zero byte"),
        ("configs/\0", "holds a zero byte"),
        ("x" * 256, "has a name of more than 255 bytes"),
        ("here/" + "\u00e4" * 128, "has a name of more than 255 bytes"),
        ('[{"role": "user"}]' * 10**5, "has a name of more than 255 bytes"),
        ("~no-user-of-this-name/x", "names a home folder that this system does not know"),
    ],
)
def test_a_path_that_no_file_can_have_is_told(path: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^paths: .{{1,130}} {message}, expected a path; "):
        paths.locate(path, Path("runs/x"))


def test_a_name_of_255_bytes_is_a_path() -> None:
    assert paths.locate("x" * 255) == Path("x" * 255)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep" / "er"))
    assert paths.cache() == tmp_path / "deep" / "er" / "minitune"
    assert paths.cache_note() is None


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"minitune-cache-{os.getuid()}"


@pytest.mark.parametrize("kind", ["a file", "in a file", "read-only", "a dangling link"])
def test_a_cache_that_cannot_be_written_moves_and_says_so(
    kind: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    if kind == "a dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "read-only":
        place.mkdir()
        access = os.access  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))
    else:
        place.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "in" if kind == "in a file" else place))
    assert paths.cache() == temporary
    note = paths.cache_note()
    assert note is not None
    assert note.endswith(f"can't be written: tokenized data goes to {temporary}; set XDG_CACHE_HOME to keep it")
    assert temporary.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_home_has_a_cache(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", unknown)
    assert paths.cache() == temporary
    assert str(paths.cache_note()).startswith("a cache folder without a home folder can't be written")


def test_the_temporary_cache_of_someone_else_is_not_used(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    temporary.symlink_to(tmp_path / "theirs")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert paths.cache() != temporary
    assert paths.cache().parent == temporary.parent
