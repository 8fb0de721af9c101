"""Interface of a verb, and the verbs that give a result to others."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """Word that runs no program; `run` takes the words after it and returns the exit code."""

    usage: str
    summary: str
    run: Callable[[Sequence[str]], int]
    details: str = ""
    parses_help: bool = False  # its own parser knows --help, with every option


def upload(words: Sequence[str]) -> int:
    """Put a folder on the Hub."""
    from minitune.cli.publishing import upload

    return upload(words)


def register(words: Sequence[str]) -> int:
    """Make a folder a version of a registered model."""
    from minitune.cli.publishing import register

    return register(words)


PUBLISHING = {
    "upload": Verb(
        "upload FOLDER OWNER/NAME [--private] [--revision R]",
        "put a model, an adapter or a .gguf file on the Hugging Face Hub, with a model card",
        upload,
        parses_help=True,
    ),
    "register": Verb(
        "register FOLDER NAME [--alias ALIAS]",
        "make it a version of a registered model: MLflow, W&B, Azure ML, the Hub",
        register,
        parses_help=True,
    ),
}
