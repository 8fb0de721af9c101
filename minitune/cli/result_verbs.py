"""Verbs on what a run has written: a page, a comparison, an upload, a registered version."""

from collections.abc import Sequence

from minitune.cli.command_result import CommandResult, Verb


def report(words: Sequence[str]) -> CommandResult:
    """Write the page of a run, or of several."""
    from minitune.cli.report import report

    return report(words)


def watch(words: Sequence[str]) -> CommandResult:
    """Serve the page of a run on this machine."""
    from minitune.cli.report import watch

    return watch(words)


def verify(words: Sequence[str]) -> CommandResult:
    """Open what was written with another program, and compare."""
    from minitune.cli.verify import verify

    return verify(words)


def upload(words: Sequence[str]) -> CommandResult:
    """Put a folder on the Hub."""
    from minitune.cli.publishing import upload

    return upload(words)


def register(words: Sequence[str]) -> CommandResult:
    """Make a folder a version of a registered model."""
    from minitune.cli.publishing import register

    return register(words)


RESULT_VERBS = {
    "report": Verb(
        "report RUN [RUN ...] [--to FILE]",
        "a page with curves, figures, samples and advice of a run, or of several beside each other",
        report,
        parses_help=True,
    ),
    "watch": Verb(
        "watch RUN [--port 8000]",
        "the page of a run in a browser on this machine, while it trains",
        watch,
        parses_help=True,
    ),
    "verify": Verb(
        "verify PATH [--against FOLDER]",
        "open a model, an adapter or an export with another program, and compare it with minitune",
        verify,
        parses_help=True,
    ),
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
