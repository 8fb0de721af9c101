"""Help of the command line: of the whole command, of a verb, of a program."""

from pathlib import Path

from minitune.cli.options import typed_name
from minitune.cli.verbs import CHANGES, VERBS
from minitune.io import toml

EXIT_CODES = {
    "0": "done",
    "1": "a fault of minitune: report it; --debug shows its traceback",
    "2": "something to change: the sentence on stderr says what",
    "3": "a disk is full: free some space and run the same command again",
    "4": "another process of the same run has ended: its own message says why",
    "128 + signal": "stopped by a signal, 130 by Ctrl-C; the same command continues the run",
}


def overview() -> str:
    """Help of the whole command: how a program is run, every verb, the exit codes."""
    me = typed_name()
    lines = [
        f"usage: {me} PROGRAM.toml [KEY=VALUE ...]",
        "",
        "Runs a program: a TOML file, or the name of a shipped one. The folder of a model, of an",
        "adapter or of a run may follow: it takes the place of model.path.",
        CHANGES,
        "",
    ]
    for verb in VERBS.values():
        lines += [f"  {verb.usage}", f"      {verb.summary}"]
    return "\n".join(
        [
            *lines,
            "",
            f"{me} VERB --help says more of a verb, {me} PROGRAM --help of a program.",
            "--version, --help; --debug shows the traceback of whatever ends a command early.",
            "--ranks N runs a program as N processes on this machine, which share out the rows.",
            "--json writes what a command found as one line on stdout, and all else on stderr.",
            "Exit codes:",
            *(f"  {code:12}  {meaning}" for code, meaning in EXIT_CODES.items()),
            "",
        ]
    )


def verb_help(name: str) -> str:
    """Help of one verb that has no parser of its own."""
    verb = VERBS[name]
    summary = f"{verb.summary[0].upper()}{verb.summary[1:]}."
    parts = [f"usage: {typed_name()} {verb.usage}\n", summary, verb.details]
    return "\n".join(part for part in parts if part) + "\n"


def program_help(name: str, file: Path) -> str:
    """Help of a program, by the name that was typed: its comment, how it is changed, its keys."""
    from minitune.cli.program_keys import described_keys  # torch comes with it

    me = typed_name()
    lines = [
        f"usage: {me} {name} [KEY=VALUE ...]",
        "",
        *toml.opening_comment(file, "program"),
        "",
        CHANGES,
    ]
    lines += [f"`{me} show {name}` writes it with every default;"]
    lines += [f"`{me} check {name}` reads it and runs nothing."]
    lines += described_keys(toml.read(file, "program")[1])
    return "\n".join(lines) + "\n"
