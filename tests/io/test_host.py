"""Memory of the process and the machine, on this system and on one that only looks like Windows."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitune import host
from minitune.io import atomic
from minitune.io.atomic import atomic_folder, write_atomic

PEAK, TOTAL = 5 * 2**32 + 7, 3 * 2**35 + 4096  # bytes, beyond 32 bits


class Function:
    """A function of a Windows library: it may be given the types of its arguments, as ctypes' are."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def windows(monkeypatch: pytest.MonkeyPatch, *, works: bool = True) -> None:
    """Give this process a kernel32 and a psapi that write where and what the real ones do."""

    def memory_info(process: int, address: int, n_bytes: int) -> int:
        assert (process, n_bytes) == (2**64 - 1, 72)  # the size that psapi checks on a 64-bit system
        assert ctypes.c_uint32.from_address(address).value == n_bytes
        ctypes.c_size_t.from_address(address + 8).value = PEAK
        return int(works)

    def memory_status(address: int) -> int:
        assert ctypes.c_uint32.from_address(address).value == 64
        ctypes.c_uint64.from_address(address + 8).value = TOTAL
        return int(works)

    libraries = {
        "psapi": SimpleNamespace(GetProcessMemoryInfo=Function(memory_info)),
        "kernel32": SimpleNamespace(GetCurrentProcess=Function(lambda: 2**64 - 1), GlobalMemoryStatusEx=Function(memory_status)),
    }
    monkeypatch.setattr(ctypes, "WinDLL", libraries.__getitem__, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


def test_windows_tells_its_memory_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    windows(monkeypatch)
    assert host.peak_bytes() == PEAK
    assert host.total_bytes() == TOTAL


def test_windows_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    windows(monkeypatch, works=False)
    with pytest.raises(OSError, match="GetProcessMemoryInfo failed"):
        host.peak_bytes()
    with pytest.raises(OSError, match="GlobalMemoryStatusEx failed"):
        host.total_bytes()


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_unix_counts_in_kib_and_macos_in_bytes(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(host, "_STATUS", Path("/nowhere"))  # a Linux without /proc
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=12345))
    monkeypatch.setattr(sys, "platform", platform)
    assert host.peak_bytes() == 12345 * unit


def test_linux_counts_without_what_the_parent_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "status").write_text("VmPeak:\t  9000 kB\nVmHWM:\t  1234 kB\nVmRSS:\t  1000 kB\n", encoding="utf-8")
    assert host.peak_bytes() == 1234 * 1024


def test_the_peak_of_this_process_grows_by_what_it_fills() -> None:
    before = host.peak_bytes()
    filled = bytearray(before + 2**26)
    assert host.peak_bytes() >= len(filled) > before
    assert before < host.total_bytes()


def test_replacement_syncs_no_folder_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = atomic.os.open

    def opens(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")  # as Windows says it of every folder
        assert flags & atomic.os.O_RDWR  # and it flushes nothing that was opened to be read
        opened.append(Path(path))
        return real(path, flags)

    monkeypatch.setattr(atomic.os, "open", opens)
    with pytest.raises(PermissionError):
        atomic.sync(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    for content in (b"one", b"two"):
        write_atomic(tmp_path / "file", content)
        with atomic_folder(tmp_path / "folder") as aside:
            (aside / "file").write_bytes(content)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder/file").read_bytes() == b"two"
    assert len(opened) >= 4


WITHOUT = """
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
from minitune.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
PROGRAM = """
name = "tiny"
[model]
path = "demo"
dtype = "float32"
[[stage]]
op = "save"
what = "params"
"""


def test_programs_run_without_the_modules_that_only_unix_has(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(PROGRAM, encoding="utf-8")
    for words in (["ls"], ["check", "tiny.toml"], ["tiny.toml"], ["inspect", "runs/tiny/params"]):
        done = subprocess.run(
            [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:minitune", "-c", WITHOUT, *words],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tiny/params/model.safetensors").is_file()
    assert (tmp_path / "runs/tiny/summary.json").is_file()
