"""Locks: one holder at a time, named to the others, and freed when its process ends."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest

from minitune.io import locks

HOLD = """
import sys, time
from pathlib import Path
from minitune.io import locks
lock = locks.acquire(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_is_refused_with_its_holder_and_freed_by_the_holders_death(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(locks.Busy, match=f"^pid {other.pid} on "):
            locks.acquire(path)
        other.kill()
    locks.acquire(path).close()


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    path, events = tmp_path / "lock", []
    first = locks.acquire(path)
    waiting = threading.Event()

    def wait(holder: str) -> None:
        events.append(holder)
        waiting.set()

    def second() -> None:
        with locks.acquire(path, wait):
            events.append("acquired")

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(60)
    assert len(events) == 1
    first.close()
    thread.join(60)
    assert events[1:] == ["acquired"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_no_busy_one(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(locks.Unsupported, match=os.strerror(number)):
        locks.acquire(tmp_path / "lock")


def test_a_holder_that_is_no_text_is_named_all_the_same(tmp_path: Path) -> None:
    with locks.acquire(tmp_path / "lock"):
        locks.holder_file(tmp_path / "lock").write_bytes(b"\xff\xfe pid")
        with pytest.raises(locks.Busy, match="pid"):
            locks.acquire(tmp_path / "lock")


def test_a_holder_that_left_no_name_is_another_process(tmp_path: Path) -> None:
    with locks.acquire(tmp_path / "lock"):
        locks.holder_file(tmp_path / "lock").unlink()
        with pytest.raises(locks.Busy, match=r"^another process$"):
            locks.acquire(tmp_path / "lock")
    locks.acquire(tmp_path / "lock").close()
