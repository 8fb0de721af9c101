"""Options of the verbs, whose mistakes end as an InputError, and the name that the command was
typed as.
"""

import argparse
import sys
from pathlib import Path
from typing import Never

from minitune.errors import InputError
from minitune.io import toml


def typed_name() -> str:
    """Words that start this program as the user did: "minitune" or "python -m minitune"."""
    return "minitune" if Path(sys.argv[0]).stem == "minitune" else "python -m minitune"


class OptionParser(argparse.ArgumentParser):
    """Parser of what follows a verb, such as `chat FOLDER [--seed S]`; InputError in place of
    argparse's exit.
    """

    def __init__(self, verb: str, *, description: str, epilog: str | None = None) -> None:
        prog = f"{typed_name()} {verb}"
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False)
        self.verb = verb.partition(" ")[0]

    def error(self, message: str) -> Never:
        """Raise an InputError with argparse's message."""
        raise InputError(
            f"{self.verb}: {message}, expected options as in `{typed_name()} {self.verb} --help`; "
            "correct the command"
        )


def announced(file: Path) -> Path:
    """Same file, named on the terminal if it is TOML: the first line does not wait for torch."""
    toml.read(file, "program")
    sys.stdout.write(f"program: {file}\n")
    sys.stdout.flush()
    return file
