"""Download verb: a model, an adapter or a data set of the Hub in a plain folder."""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from minitune.cli.command_result import CommandResult
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.io.paths import user_path
from minitune.io.units import format_bytes
from minitune.registry.hub import ADAPTER, fetch
from minitune.registry.hub_data import fetch_data
from minitune.registry.hub_splits import parsed

# what does the same here -> options of other tools
ELSEWHERE = {
    "write --to DIR": ("--output-dir", "--output_dir", "--local-dir", "--local_dir"),
    "set the variable HF_TOKEN": ("--hf-token", "--hf_token", "--token"),
    "what is needed is chosen by itself": ("--ignore-patterns", "--include", "--exclude"),
}


class Fetched(NamedTuple):
    """Folder that was fetched, the commit it is of, and lines on how to use it."""

    path: str
    commit: str
    lines: list[str]


def download(words: Sequence[str]) -> CommandResult:
    """Fetch what the words name, say on stdout where it lies and how to use it, and return the
    same; InputError else.

    On a node where many ranks run this, one fetches and the others wait for it; LOCAL_RANK 0 does
    the talking.
    """
    for word in words:
        _refuse_elsewhere(word.partition("=")[0])
    options = _parser().parse_args(words)
    # On a node where many ranks run this, they all wait for one download, and one of them reports
    # it.
    talks = os.environ.get("LOCAL_RANK", "0") == "0"

    def tell(text: str) -> None:
        if talks:
            sys.stderr.write(f"{text}\n")

    bring = _data_set if options.dataset else _model
    with _ended_by_ctrl_c():
        fetched = bring(options.repo, options.revision, options.to, tell)
    if talks:
        sys.stdout.write("".join(f"{line}\n" for line in fetched.lines))
    return CommandResult(fetched._asdict())


def _refuse_elsewhere(option: str) -> None:
    """InputError for an option that `tune download` or `hf download` has."""
    for remedy, names in ELSEWHERE.items():
        if option in names:
            raise InputError(f"download: {option} is unknown, expected options here; {remedy}")


def _parser() -> OptionParser:
    description = "Fetch a model folder or a data set: only what is needed, unfinished files again."
    parser = OptionParser("download", description=description)
    parser.add_argument(
        "repo", metavar="REPO", help="OWNER/NAME on the Hub; HF_TOKEN opens gated and private ones"
    )
    parser.add_argument("--to", metavar="DIR", help="the folder; models/ or data/OWNER/NAME else")
    parser.add_argument(
        "--revision",
        metavar="R",
        default="main",
        help="a branch, a tag or a commit; main if absent",
    )
    parser.add_argument(
        "--dataset",
        action="store_true",
        help="REPO is a data set: OWNER/NAME, with /CONFIG and :SPLIT where it has several",
    )
    return parser


def _model(repo: str, revision: str, to: str | None, tell: Callable[[str], None]) -> Fetched:
    """Fetch a model or an adapter, and return where it lies and how to use it."""
    folder = user_path(to or f"models/{repo}")
    sizes, commit = fetch(repo, revision, folder, tell)
    key = "model.deltas" if ADAPTER in sizes else "model.path"
    n_bytes = format_bytes(sum(sizes.values()))
    lines = [
        f"{folder}: {repo} at {commit[:12]}, {len(sizes)} files, {n_bytes}",
        f"look at it: python -m minitune inspect {folder}",
        f"train it:   python -m minitune PROGRAM.toml {key}={folder}",
    ]
    return Fetched(str(folder), commit, lines)


def _data_set(repo: str, revision: str, to: str | None, tell: Callable[[str], None]) -> Fetched:
    """Fetch a split of a data set, and return where it lies and how to train on it."""
    # which imports torch, as a download of a model does not
    from minitune.data.files import is_data_file

    name = parsed(f"hf:{repo.removeprefix('hf:')}")
    if revision != "main":
        name = name._replace(revision=revision)
    folder = user_path(to or f"data/{name.repo}")
    found = fetch_data(name, lambda commit: folder, is_data_file, tell, "--to")
    n_files, n_bytes = len(found.files), format_bytes(found.n_bytes)
    paths = [str(file) for file in found.files]
    value = paths[0] if n_files == 1 else json.dumps(paths, ensure_ascii=False)
    lines = [
        f"{folder}: {name.repo} at {found.commit[:12]}, {n_files} files of rows, {n_bytes}",
        f"train on it: python -m minitune PROGRAM.toml data.train.path={shlex.quote(value)}",
    ]
    return Fetched(str(folder), found.commit, lines)


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
