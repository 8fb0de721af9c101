"""Command line: run a program, or look at one. Verbs that only look stay fast: torch is imported where it is needed."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from minitune import __version__
from minitune.errors import InputError, nearest
from minitune.io import paths, toml

HELP = """\
usage: python -m minitune PROGRAM.toml [KEY=VALUE ...]

Runs a program: a TOML file, or the name of a shipped one. KEY=VALUE changes it: train.optimizer.lr=1e-4, seed=1.

  ls                            the shipped programs
  cp NAME DEST                  copy a shipped program, to change it
  show PROGRAM [KEY=VALUE ...]  the program with every default written out
  check PROGRAM [KEY=VALUE ...] read the program, find its files, match its globs; run nothing
  plan PROGRAM [KEY=VALUE ...]  memory and operations of each training stage, and whether it fits; reads no weight
  schema                        the JSON Schema of programs
  show-sample PROGRAM [--n 3]   text, ids and mask of the first samples of its data [--data NAME] [KEY=VALUE ...]
  download REPO [--to DIR]      fetch a model folder or an adapter from the Hugging Face Hub [--revision R]
  inspect FOLDER                what a model or adapter folder holds; reads no weight
  chat FOLDER [--OPTION VALUE]  talk with a model folder, or with demo; chat --help lists the options
  --help, --version
"""
VERBS = ("ls", "cp", "show", "check", "plan", "schema", "show-sample", "chat", "download", "inspect")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say and return the exit code: 0, 2 for what the user must change, 128 + signal when stopped by one."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run_words(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:
        if not _drop_closed_stdout():
            raise
        return 141


def _drop_closed_stdout() -> bool:
    """True if the reader of the output, such as head, has gone; what is left is dropped."""
    try:
        # an empty line tells this pipe from another one that broke, such as a logger's
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, which would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run_words(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        sys.stdout.write(HELP)
    elif words == ["--version"]:
        sys.stdout.write(f"minitune {__version__}\n")
    elif words == ["ls"]:
        _ls()
    elif words[0] == "cp":
        _cp(*words[1:]) if len(words) == 3 else _refuse(f"cp {' '.join(words[1:])}, expected cp NAME DEST")
    elif words == ["schema"]:
        from minitune.programs import program

        sys.stdout.write(json.dumps(program.schema(), indent=2) + "\n")
    elif words[0] in ("show", "check", "plan", "show-sample") and len(words) == 1:
        options = "[--n 3] [--data NAME] " if words[0] == "show-sample" else ""
        _refuse(f"{words[0]} without a program, expected {words[0]} PROGRAM {options}[KEY=VALUE ...]")
    elif words[0] == "show":
        _show(*words[1:])
    elif words[0] == "check":
        _check(*words[1:])
    elif words[0] == "plan":
        file = _announced(_program_file(words[1]))
        from minitune.cli.plan import show

        return show(file, words[2:])
    elif words[0] == "show-sample":
        from minitune.cli import show_sample

        return show_sample.show(_program_file(words[1]), words[2:])
    elif words[0] == "chat":
        from minitune.cli import chat

        return chat.chat(words[1:])
    elif words[0] == "download":
        from minitune.cli.download import download

        return download(words[1:])
    elif words[0] == "inspect":
        from minitune.cli.inspect import inspect

        return inspect(*words[1:]) if len(words) == 2 else _refuse("inspect without a folder, expected inspect FOLDER")
    elif words[0] in VERBS:
        _refuse(f"{' '.join(words)}, expected {words[0]} alone")
    else:
        return _run(*words)
    return 0


def _ls() -> None:
    programs = paths.shipped()
    width = max(map(len, programs), default=0)
    for name, path in programs.items():
        comments = (line.removeprefix("#").strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
        sys.stdout.write(f"{name:{width}}  {next(comments, '')}".rstrip() + "\n")


def _cp(name: str, dest: str) -> None:
    source = _program_file(name)
    target = Path(dest) / source.name if Path(dest).is_dir() else Path(dest)
    if target.exists():
        _refuse(f"{target} exists, expected a new file; nothing was copied")
    if not target.parent.is_dir():
        _refuse(f"{target.parent} is no folder, expected one that exists")
    shutil.copyfile(source, target)
    sys.stdout.write(f"{target}\n")


def _show(name: str, *overrides: str) -> None:
    from minitune.programs import program

    sys.stdout.write(program.resolved(program.load(_program_file(name), overrides)))


def _check(name: str, *overrides: str) -> None:
    file = _announced(_program_file(name))
    from minitune.programs import program, save_paths
    from minitune.programs.loading import check

    loaded = program.load(file, overrides)
    lines = check(loaded.model, loaded.data, loaded.stage)
    save_paths.check(loaded)
    for line in lines:
        sys.stdout.write(f"{line}\n")


def _run(name: str, *overrides: str) -> int:
    file = _announced(_program_file(name))
    from minitune.programs import program
    from minitune.programs.run import run_program
    from minitune.programs.signals import Stopped, StopSignals

    stop = StopSignals()
    try:
        run_program(program.load(file, overrides), stop)
    except Stopped as stopped:
        sys.stderr.write(f"stopped at step {stopped.step}, saved in {stopped.folder}; run the same command to continue\n")
        return 128 + (stop.number or 0)
    return 0


def _announced(file: Path) -> Path:
    """Same file, named on the terminal if it is TOML: so the first line, and the first mistake, do not wait for torch."""
    toml.read(file, "program")
    sys.stdout.write(f"program: {file}\n")
    sys.stdout.flush()
    return file


def _program_file(name: str) -> Path:
    path = paths.program_file(name)
    if path.is_file():
        return path
    shipped = list(paths.shipped())
    known = [*VERBS, *shipped]
    hint = nearest(name.removeprefix("programs/").removesuffix(".toml"), known)
    return _refuse(f"{name} is no file, no verb and no shipped program, expected one of {', '.join(known)}{hint}")


def _refuse(message: str) -> Never:
    raise InputError(f"minitune: {message}")


if __name__ == "__main__":
    raise SystemExit(main())
