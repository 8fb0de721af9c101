"""The array cache: whole or made again, in words where the disk is full, and without the leavings of killed processes."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from minitune.errors import InputError
from minitune.io import array_cache, atomic
from minitune.io.checksums import CHECKSUMS, write_checksums

VALUES = np.arange(300, dtype=np.int32)


def fill(folder: Path) -> None:
    with array_cache.filling(folder, VALUES.nbytes) as aside:
        np.save(aside / "tokens.npy", VALUES)
        (aside / "report.json").write_text('{"n": 300}', encoding="utf-8")


def test_every_flipped_bit_of_a_cache_is_found_and_the_cache_made_again(tmp_path: Path) -> None:
    draw = Random(0)
    fill(tmp_path / "c")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir()}
    assert set(sizes) == {"tokens.npy", "report.json", CHECKSUMS}
    for _ in range(60):
        name = draw.choice(sorted(sizes))
        content = bytearray((tmp_path / "c" / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "c" / name).write_bytes(content)
        assert not array_cache.is_whole(tmp_path / "c")
        assert not (tmp_path / "c").exists()
        fill(tmp_path / "c")
        assert array_cache.is_whole(tmp_path / "c")
    assert np.array_equal(array_cache.load(tmp_path / "c", "tokens")[0], VALUES)


@pytest.mark.parametrize("name", ["tokens.npy", "report.json", CHECKSUMS])
@pytest.mark.parametrize("content", [None, b"", b"[" * 10**5, b"\xff", b'{"seal": 7}', b"7"])
def test_a_file_that_is_gone_or_another_is_damage(name: str, content: bytes | None, tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    if content is not None:
        (tmp_path / "c" / name).write_bytes(content)
    assert not array_cache.is_whole(tmp_path / "c")


def test_a_damaged_cache_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c/tokens.npy").write_bytes(b"other")

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    message = r"tokens\.npy is damaged, and the folder can't be removed .*; delete it, or set XDG_CACHE_HOME to another"
    with pytest.raises(InputError, match=message):
        array_cache.is_whole(tmp_path / "c")


@pytest.mark.parametrize("free", [0, 1, 1199, *range(100, 1200, 100)])
def test_too_small_a_disk_is_told_before_a_byte_is_written(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "free_bytes", lambda path: free)
    message = (
        rf"needs about 1,200 bytes, and can't be written \(its disk is too full; {free:,} bytes are free\), .*XDG_CACHE_HOME"
    )
    with pytest.raises(InputError, match=message):
        fill(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


FAILING = ("fsync", "rename", "mkdir", "posix_fallocate")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_at_any_operation_is_told_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    messages = []
    for k in range(1, 30):
        left = [k]
        with pytest.MonkeyPatch.context() as patch:
            for name in FAILING:
                patch.setattr(os, name, failing(getattr(os, name), left, number))
            try:
                with array_cache.filling(tmp_path / "in" / "c", 1200) as aside:
                    array_cache.zeros(aside / "tokens.npy", np.int32, (300,))[:] = VALUES
            except InputError as error:
                messages.append(str(error))
        if (tmp_path / "in").exists():
            assert {path.name for path in (tmp_path / "in").iterdir()} <= {"c"}
        if array_cache.is_whole(tmp_path / "in" / "c"):
            atomic.remove_folder(tmp_path / "in" / "c")
        if left[0] > 0:
            break
    assert k > len(messages) >= 4
    assert all(os.strerror(number) in message and "XDG_CACHE_HOME" in message for message in messages)


def failing(real: Any, left: list[int], number: int) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    return call


def test_zeros_have_their_place_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reserved", "filled"):
        if name == "filled":  # a system without posix_fallocate, such as macOS
            monkeypatch.delattr(os, "posix_fallocate")
        values = array_cache.zeros(tmp_path / name, np.float32, (700, 1000))
        assert (tmp_path / name).stat().st_blocks * 512 >= values.nbytes
        assert not values.any()
        assert np.load(tmp_path / name).shape == (700, 1000)


def test_what_a_killed_process_was_filling_is_removed_by_the_next(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    host = socket.gethostname()
    ages = {f"{host}-{ended.pid}-a": 0, f"{host}-{os.getpid()}-b": 0, "far-7-c": 0, "far-7-d": 8 * 24 * 3600}
    for name, age_s in ages.items():
        folder = tmp_path / f".tmp-{name}"
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"half")
        for path in (folder / "tokens.npy", folder):
            os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    fill(tmp_path / "c")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"c", f".tmp-{host}-{os.getpid()}-b", ".tmp-far-7-c"}


def test_a_cache_that_another_process_was_faster_to_write_stays(tmp_path: Path) -> None:
    with array_cache.filling(tmp_path / "c") as aside:
        (aside / "mine").write_bytes(b"mine")
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "theirs").write_bytes(b"theirs")
        write_checksums(tmp_path / "c", [tmp_path / "c" / "theirs"])
    assert array_cache.is_whole(tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"theirs", CHECKSUMS}
