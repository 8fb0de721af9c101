"""Entry of the command line, which imports the rest of it where Ctrl-C already ends in silence."""

import signal
from collections.abc import Sequence
from typing import Never


def start() -> Never:
    """Run the command line and end the process with its exit code, also if Ctrl-C comes early,
    while modules are imported, or late."""
    try:
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say and return the exit code, as cli.command_line.answer."""
    from minitune.cli.command_line import answer

    return answer(argv)


if __name__ == "__main__":
    start()
