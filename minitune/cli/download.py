"""The download verb: a model or adapter of the Hub in a plain folder."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from minitune.errors import InputError
from minitune.io.units import format_bytes
from minitune.registry.hub import ADAPTER, fetch


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise InputError(f"hub: {message}, expected {self.format_usage().removeprefix('usage: ').strip()}; correct the command")


def download(words: Sequence[str]) -> int:
    """Fetch what the words name, say on stdout where it lies and how to use it, and return the exit code 0; InputError else.

    On a node where many ranks run this, one fetches and the others wait for it; LOCAL_RANK 0 does the talking.
    """
    parser = _Parser(prog="download", description="Fetch a model folder: only the files that are needed, unfinished ones again.")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the Hub; HF_TOKEN opens gated and private ones")
    parser.add_argument("--to", metavar="DIR", help="the folder; models/OWNER/NAME if absent")
    parser.add_argument("--revision", metavar="R", default="main", help="a branch, a tag or a commit; main if absent")
    options = parser.parse_args(words)
    folder = Path(options.to or f"models/{options.repo}").expanduser()
    talks = os.environ.get("LOCAL_RANK", "0") == "0"

    def tell(text: str) -> None:
        if talks:
            sys.stderr.write(f"{text}\n")

    sizes, commit = fetch(options.repo, options.revision, folder, tell)
    if talks:
        use = f"model.{'deltas' if ADAPTER in sizes else 'path'}={folder}"
        sys.stdout.write(
            f"{folder}: {options.repo} at {commit[:12]}, {len(sizes)} files, {format_bytes(sum(sizes.values()))}\n"
            f"look at it: python -m minitune inspect {folder}\n"
            f"train it:   python -m minitune PROGRAM.toml {use}\n"
        )
    return 0
