"""Exit codes of the command line, and the one sentence that an error ends a command with."""

import errno
import os
from typing import NamedTuple

from minitune.errors import RANK_LOST, DiskFullError, InputError, RankLostError, cut, printable
from minitune.io.atomic import NO_ROOM

DONE, BUG, REFUSED, DISK_FULL = 0, 1, 2, 3
INTERRUPTED, OUTPUT_CLOSED = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as a shell counts them
REASON_CHARACTERS = 200
REMEDIES = {
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.EEXIST: "expected a folder, or nothing of that name; choose another place",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "point to a file",
    errno.ENAMETOOLONG: "write one path, with names of at most 255 bytes",
    errno.ELOOP: "its links lead in a circle; point to the file itself",
    errno.EMFILE: "raise the limit of open files with `ulimit -n 4096`",
    errno.ENFILE: "close other programs: the system has too many files open",
    errno.EFBIG: "raise the limit with `ulimit -f unlimited`, or choose another file system",
    errno.EIO: "the disk or the network behind it failed; look at the system's log, then run again",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
}
REPORT = (
    "a fault of minitune, not of yours; the same command with --debug shows where; please report "
    "it with that text in minitune's issue tracker"
)
OTHER_REMEDY = "mend what the system says and run the same command again"


class Failure(NamedTuple):
    """End of a command that failed: its exit code and its line on stderr."""

    code: int
    message: str


def failure(error: Exception) -> Failure:
    """Exit code and sentence of an error; one that no rule expects is a fault of minitune."""
    text = str(error)
    if isinstance(error, InputError):
        return Failure(DISK_FULL if isinstance(error, DiskFullError) else REFUSED, text)
    if isinstance(error, RankLostError):
        remedy = "its own message says why; run the same command again to continue"
        return Failure(RANK_LOST, f"minitune: another process of this run has ended; {remedy}")
    if isinstance(error, OSError):
        return _system_failure(error)
    if isinstance(error, ValueError) and "embedded null" in text:
        return Failure(REFUSED, "minitune: a path holds a NUL character, expected none; correct it")
    # torch.OutOfMemoryError by its name: this module is imported before torch
    no_memory = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    if no_memory or "can't allocate memory" in text:
        reason = _first_line(text) or "no memory is left"
        remedy = "set micro_batch_size = 1 or a shorter seq_len; the verb plan says what fits"
        return Failure(REFUSED, f"minitune: out of memory ({reason}); {remedy}")
    found = f"{type(error).__name__}: {_first_line(text)}".rstrip(": ")
    return Failure(BUG, f"minitune: {found}: {REPORT}")


def _system_failure(error: OSError) -> Failure:
    """Failure of a file or a connection: "minitune: PATH: reason; remedy"."""
    names = [_shown(name) for name in (error.filename, error.filename2) if name is not None]
    reason = error.strerror or _first_line(str(error)) or type(error).__name__
    code = DISK_FULL if error.errno in NO_ROOM else REFUSED
    remedy = REMEDIES.get(error.errno or 0, OTHER_REMEDY)
    place = f"{' -> '.join(names)}: " if names else ""
    return Failure(code, f"minitune: {place}{reason}; {remedy}")


def _shown(name: str | bytes | int) -> str:
    """Path as a message shows it: cut in the middle where it is long, on one line."""
    text = f"file descriptor {name}" if isinstance(name, int) else os.fsdecode(name)
    return printable(cut(text))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:REASON_CHARACTERS]
