"""Options of the verbs, whose mistakes end as an InputError."""

import argparse
from typing import Never

from minitune.errors import InputError


class OptionParser(argparse.ArgumentParser):
    """Parser of what follows a verb, such as `chat FOLDER [--seed S]`; InputError in place of argparse's exit."""

    def __init__(self, verb: str, *, description: str, epilog: str | None = None) -> None:
        super().__init__(f"python -m minitune {verb}", description=description, epilog=epilog, allow_abbrev=False)
        self.verb = verb.partition(" ")[0]

    def error(self, message: str) -> Never:
        """Raise an InputError with argparse's message."""
        raise InputError(f"{self.verb}: {message}, expected options as in `{self.prog} --help`; correct the command")
