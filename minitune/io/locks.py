"""Locks between processes. The system frees a lock when its process ends, however it ends."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

# of flock, on file systems without locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class Busy(Exception):  # noqa: N818 - not an error: whoever asks decides what follows
    """Another process has the lock; holder says which one, such as "pid 7 on somewhere"."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Unsupported(Exception):  # noqa: N818 - not an error: whoever asks decides what follows
    """File system without locks: Lustre without `-o flock`, NFS without its lock daemon."""


class Lock:
    """Lock of this process on a path, until it is closed or the process ends."""

    def __init__(self, lock: Any | None, holder: Path) -> None:
        """lock: an acquired filelock.FileLock, or None where there are no locks; holder: the file
        with this process's name."""
        self._lock, self._holder = lock, holder

    def close(self) -> None:
        """Free the lock; a second call does nothing."""
        if self._lock is not None and self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release(force=True)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def holder_file(path: Path) -> Path:
    """File that names who has the lock; not the lock file, which other processes can't read on
    Windows.
    """
    return path.with_name(f"{path.name}.holder")


def acquire(path: Path, wait: Callable[[str], None] | None = None) -> Lock:
    """Lock on a path, whose folder exists; Busy if another process has it.

    With `wait`, that is called with the holder's name instead, and then the lock is waited for.
    Unsupported on a file system that has no locks.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = _holder(path)
        if wait is None:
            raise Busy(holder) from None
        wait(holder)
        lock.acquire()
    except NotImplementedError as error:
        raise Unsupported(str(error)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise Unsupported(error.strerror) from None
    holder_file(path).write_text(f"pid {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return Lock(lock, holder_file(path))


def _holder(path: Path) -> str:
    try:
        return (
            holder_file(path).read_text(encoding="utf-8", errors="replace").strip()
            or "another process"
        )
    except OSError:
        return "another process"
