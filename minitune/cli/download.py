"""Download verb: a model or adapter of the Hub in a plain folder."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minitune.cli.options import OptionParser
from minitune.io.paths import user_path
from minitune.io.units import format_bytes
from minitune.registry.hub import ADAPTER, fetch


def download(words: Sequence[str]) -> int:
    """Fetch what the words name, say on stdout where it lies and how to use it, and return the exit
    code 0; InputError else.

    On a node where many ranks run this, one fetches and the others wait for it; LOCAL_RANK 0 does
    the talking.
    """
    description = "Fetch a model folder: only the files that are needed, unfinished ones again."
    parser = OptionParser("download", description=description)
    parser.add_argument(
        "repo", metavar="REPO", help="OWNER/NAME on the Hub; HF_TOKEN opens gated and private ones"
    )
    parser.add_argument("--to", metavar="DIR", help="the folder; models/OWNER/NAME if absent")
    parser.add_argument(
        "--revision",
        metavar="R",
        default="main",
        help="a branch, a tag or a commit; main if absent",
    )
    options = parser.parse_args(words)
    folder = user_path(options.to or f"models/{options.repo}")
    # On a node where many ranks run this, they all wait for one download, and one of them reports
    # it.
    talks = os.environ.get("LOCAL_RANK", "0") == "0"

    def tell(text: str) -> None:
        if talks:
            sys.stderr.write(f"{text}\n")

    with _ended_by_ctrl_c():
        sizes, commit = fetch(options.repo, options.revision, folder, tell)
    if talks:
        key = "model.deltas" if ADAPTER in sizes else "model.path"
        sys.stdout.write(
            f"{folder}: {options.repo} at {commit[:12]}, {len(sizes)} files, "
            f"{format_bytes(sum(sizes.values()))}\n"
            f"look at it: python -m minitune inspect {folder}\n"
            f"train it:   python -m minitune PROGRAM.toml {key}={folder}\n"
        )
    return 0


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once, where Python waits for every answer on its way.

    A download may be killed at any instant: the next one goes on with the files that are missing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
