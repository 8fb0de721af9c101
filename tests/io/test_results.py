"""Saves replace what a save wrote and nothing else: whatever else lies at a path is refused and stays as it is."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minitune.errors import InputError
from minitune.io import results

Place = Callable[[Path], object]


def save_folder(path: Path, content: bytes = b"weights") -> None:
    with results.result_folder(path) as aside:
        (aside / "model.safetensors").write_bytes(content)
        (aside / "config.json").write_bytes(b"{}")


def save_file(path: Path, content: bytes = b"weights") -> None:
    with results.result_file(path) as aside:
        aside.write_bytes(content)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every entry below a folder: the bytes of a file, the target of a link."""
    entries = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for name, path in entries.items()
    }


@pytest.mark.parametrize("made", [lambda path: None, Path.mkdir], ids=["nothing", "an empty folder"])
def test_a_folder_is_written_where_nothing_is_lost(made: Place, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    path.parent.mkdir()
    made(path)
    save_folder(path)
    assert set(tree(path)) == {"config.json", "model.safetensors", results.MARKER}
    assert list(tmp_path.joinpath("deep").iterdir()) == [path]


def test_an_earlier_save_is_replaced_whole(tmp_path: Path) -> None:
    with results.result_folder(tmp_path / "out") as aside:
        (aside / "model-00001-of-00002.safetensors").write_bytes(b"a shard")
    save_folder(tmp_path / "out", b"one file")
    save_folder(tmp_path / "out", b"and again")
    (tmp_path / "out" / "config.json").unlink()  # a file that is gone can't be lost
    save_folder(tmp_path / "out", b"another")
    assert set(tree(tmp_path / "out")) == {"config.json", "model.safetensors", results.MARKER}
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"another"


def test_an_earlier_file_is_replaced_whole(tmp_path: Path) -> None:
    for content in (b"one", b"another", b"a third"):
        save_file(tmp_path / "model.gguf", content)
        assert (tmp_path / "model.gguf").read_bytes() == content
    assert set(tree(tmp_path)) == {"model.gguf", f".model.gguf{results.MARKER}"}


def note(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work", encoding="utf-8")


def model_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}", encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"weights")


def save_with(name: str, content: bytes) -> Place:
    def place(path: Path) -> None:
        save_folder(path)
        (path / name).write_bytes(content)

    return place


def save_with_folder(path: Path) -> None:
    save_folder(path)
    (path / "runs").mkdir()


def save_with_link(path: Path) -> None:
    save_folder(path)
    shutil.move(path / "model.safetensors", path.parent / "weights")
    (path / "model.safetensors").symlink_to(path.parent / "weights")


def marker_alone(path: Path) -> None:
    save_folder(path)
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
    (path / results.MARKER).write_bytes(b"not JSON")


def link(made: Place) -> Place:
    def place(path: Path) -> None:
        target = path.with_name("elsewhere")
        made(target)
        path.symlink_to(target)

    return place


FOLDERS: dict[str, tuple[Place, str]] = {
    "notes": (note, r"out holds thesis\.txt, which no save stage wrote, expected nothing there, or an earlier save"),
    "a model folder": (model_folder, r"holds config\.json, which no save stage wrote"),
    "a file": (lambda path: path.write_bytes(b"rows"), "is a file where a folder is to be written"),
    "a user's file in it": (save_with("notes.txt", b"mine"), r"holds notes\.txt, which no save stage wrote"),
    "a user's folder in it": (save_with_folder, "holds runs, which no save stage wrote"),
    "a changed file": (save_with("config.json", b"{ }"), r"holds config\.json, which was changed after it was saved"),
    "as long as before": (save_with("model.safetensors", b"weightz"), r"holds model\.safetensors, which was changed"),
    "a link in it": (save_with_link, r"holds model\.safetensors, which no save stage wrote"),
    "no marker": (marker_alone, "holds .minitune-files.json, which no save stage wrote"),
    "a link to a save": (link(save_folder), "is a symbolic link, expected .*; give the path that it points to"),
    "a link to nothing": (link(lambda path: None), "is a symbolic link"),
}


@pytest.mark.parametrize(("place", "message"), FOLDERS.values(), ids=FOLDERS)
def test_what_no_save_wrote_is_refused_and_stays(place: Place, message: str, tmp_path: Path) -> None:
    place(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=f"^results: .*{message}"):
        save_folder(tmp_path / "out", b"new")
    assert tree(tmp_path) == before


def other_file(path: Path) -> None:
    save_file(path)
    path.write_bytes(b"weightz")


FILES: dict[str, tuple[Place, str]] = {
    "a user's file": (lambda path: path.write_bytes(b"rows"), "was not written by an export stage"),
    "another file of its name": (other_file, "or was changed after it"),
    "a folder": (Path.mkdir, "is no file"),
    "a save's folder": (save_folder, "is no file"),
    "a link": (link(save_file), "is a symbolic link"),
}


@pytest.mark.parametrize(("place", "message"), FILES.values(), ids=FILES)
def test_a_file_that_no_export_wrote_is_refused_and_stays(place: Place, message: str, tmp_path: Path) -> None:
    place(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=f"^results: .*{message}"):
        save_file(tmp_path / "out", b"new")
    assert tree(tmp_path) == before


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"rows")
    with pytest.raises(InputError, match=r"results: .*out would lie in .*train\.jsonl, which is no folder; choose another"):
        save_folder(tmp_path / "train.jsonl" / "deep" / "out")


def test_a_file_that_comes_while_a_save_is_written_stays(tmp_path: Path) -> None:
    save_folder(tmp_path / "out", b"old")
    with pytest.raises(InputError, match=r"holds notes\.txt"), results.result_folder(tmp_path / "out") as aside:  # noqa: PT012
        (aside / "config.json").write_bytes(b"new")
        (tmp_path / "out" / "notes.txt").write_bytes(b"mine")
    assert (tmp_path / "out/notes.txt").read_bytes() == b"mine"
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_large_files_are_known_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "HASHED_BELOW_BYTES", 7)  # "weights" has 7 bytes
    save_folder(tmp_path / "out")
    save_folder(tmp_path / "out")
    os.utime(tmp_path / "out/model.safetensors", (1, 1))
    with pytest.raises(InputError, match=r"holds model\.safetensors, which was changed after it was saved"):
        save_folder(tmp_path / "out")


def test_every_flipped_bit_of_saved_weights_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    save_folder(folder)
    results.require_unharmed(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        message = r"model\.safetensors is not what a save stage wrote there .*; save it again, or delete \.minitune-files"
        with pytest.raises(InputError, match=message):
            results.require_unharmed(folder)
    file.write_bytes(whole)
    (folder / "config.json").write_bytes(b'{"mine": 1}')  # a user's own, and no weight
    results.require_unharmed(folder)
    (folder / results.MARKER).unlink()
    file.write_bytes(b"other")
    results.require_unharmed(folder)  # of another tool


def test_a_large_save_is_hashed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "HASHED_BELOW_BYTES", 7)
    save_folder(tmp_path / "out")
    (tmp_path / "out/model.safetensors").write_bytes(b"weightz")
    with pytest.raises(InputError, match="its sha256 differs"):
        results.require_unharmed(tmp_path / "out")
