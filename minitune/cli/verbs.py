"""Verbs of the command line: what each does, and its help. torch is imported where it is needed."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from minitune.cli.command_result import CommandResult, Verb
from minitune.cli.guesses import YAML_SUFFIXES, hint, yaml_hint
from minitune.cli.model_folders import with_model
from minitune.cli.options import announced, typed_name
from minitune.cli.result_verbs import RESULT_VERBS
from minitune.errors import InputError, cut, nearest
from minitune.io import paths, toml

HELP_WORDS = ("--help", "-h")


def ls(words: Sequence[str]) -> CommandResult:
    """Print the shipped programs, each with its first comment."""
    if words:
        refuse(f"ls {' '.join(words)}, expected ls alone")
    programs = paths.shipped()
    width = max(map(len, programs), default=0)
    names = programs.items()
    opening = {n: next(iter(toml.opening_comment(p, "program")), "") for n, p in names}
    for name, comment in opening.items():
        sys.stdout.write(f"{name:{width}}  {comment}".rstrip() + "\n")
    return CommandResult({"programs": opening})


def cp(words: Sequence[str]) -> CommandResult:
    """Copy a shipped program; InputError for a place that is taken or lies in no folder."""
    if len(words) != 2:
        refuse(f"cp {' '.join(words)}, expected cp NAME DEST")
    source, dest = program_file(words[0]), paths.user_path(words[1])
    target = dest / source.name if dest.is_dir() else dest
    if target.exists():
        refuse(f"{target} exists, expected a new file; nothing was copied")
    if not target.parent.is_dir():
        refuse(f"{target.parent} is no folder, expected one that exists")
    shutil.copyfile(source, target)
    sys.stdout.write(f"{target}\n")
    return CommandResult({"path": str(target)})


def show(words: Sequence[str]) -> CommandResult:
    """Print a program with its overrides and every default."""
    import msgspec

    from minitune.programs import program
    from minitune.programs.variables import as_written

    file = _program_of("show", words)
    loaded, written = program.read(file, with_model(words[1:], file.stem))
    sys.stdout.write(program.resolved(loaded, absent=True, written=written))
    return CommandResult({"program": as_written(msgspec.to_builtins(loaded), written)})


def check(words: Sequence[str]) -> CommandResult:
    """Read a program and all it names but weights; InputError for whatever would stop it later."""
    file = announced(_program_of("check", words))
    from minitune.planning.mesh import mesh_under
    from minitune.programs import log, program, save_paths
    from minitune.programs.check import check as findings
    from minitune.programs.profiling.check import check_steps
    from minitune.programs.sharding import sharding_of
    from minitune.programs.shared_weights import check_shared_weights
    from minitune.sharding.ranks import ALONE

    loaded = program.load(file, with_model(words[1:], file.stem))
    loaded.log.check()
    checked = findings(loaded.model, loaded.data, loaded.stage, log.say_early)
    save_paths.check(loaded)
    sharding_of(loaded.plan, loaded.mesh, ALONE, checked.first.model, "cpu")
    check_shared_weights(loaded, checked.first, mesh_under(loaded.mesh, loaded.plan))
    lines = [*checked.lines, *check_steps(loaded.profile, loaded.stage, checked.first)]
    for line in lines:
        sys.stdout.write(f"{line}\n")
    return CommandResult({"lines": lines})


def plan(words: Sequence[str]) -> CommandResult:
    """Print memory, operations and time of each training stage."""
    wants_help = any(word in HELP_WORDS for word in words)
    file = Path() if wants_help else announced(_program_of("plan", words))
    from minitune.cli.plan import show

    return show(file, HELP_WORDS[:1] if wants_help else words[1:])


def data(words: Sequence[str]) -> CommandResult:
    """Print what the data of a program holds."""
    file = announced(_program_of("data", words))
    from minitune.cli.data import show

    return show(file, with_model(words[1:], file.stem))


def skill(words: Sequence[str]) -> CommandResult:
    """Print a page that tells a coding agent how to use minitune."""
    if words:
        refuse(f"skill {' '.join(words)}, expected skill alone")
    from minitune.cli.skill import page

    text = page()
    sys.stdout.write(text)
    return CommandResult({"text": text})


def schema(words: Sequence[str]) -> CommandResult:
    """Print the JSON Schema of programs."""
    if words:
        refuse(f"schema {' '.join(words)}, expected schema alone")
    from minitune.programs import program

    content = program.schema()
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    return CommandResult(content)


def show_sample(words: Sequence[str]) -> CommandResult:
    """Print text, ids and mask of the first samples of a program's data."""
    wants_help = any(word in HELP_WORDS for word in words)
    file = Path() if wants_help else _program_of("show-sample", words)
    from minitune.cli.show_sample import show

    return show(file, HELP_WORDS[:1] if wants_help else words[1:])


def inspect(words: Sequence[str]) -> CommandResult:
    """Print what a folder holds."""
    if len(words) != 1:
        found = f"{len(words)} folders" if words else "without a folder"
        refuse(f"inspect {found}, expected inspect FOLDER")
    from minitune.cli.inspect import inspect

    return inspect(words[0])


def _chat(words: Sequence[str]) -> CommandResult:
    from minitune.cli.chat import chat

    return chat(words)


def _download(words: Sequence[str]) -> CommandResult:
    from minitune.cli.download import download

    return download(words)


def _finish(words: Sequence[str]) -> CommandResult:
    from minitune.cli.running import finish

    return finish(words)


def _merge(words: Sequence[str]) -> CommandResult:
    from minitune.cli.running import merge

    return merge(words)


def _cache(words: Sequence[str]) -> CommandResult:
    from minitune.cli.cache import cache

    return cache(words)


CHANGES = "KEY=VALUE changes the program for this command: train.optimizer.lr=1e-4, seed=1."
VERBS = {
    "ls": Verb("ls", "the shipped programs", ls),
    "cp": Verb(
        "cp NAME DEST",
        "copy a shipped program, to change it",
        cp,
        "DEST is a new file or a folder. Nothing is ever overwritten.",
    ),
    "show": Verb(
        "show PROGRAM [KEY=VALUE ...]",
        "the program with every default written out",
        show,
        CHANGES,
    ),
    "check": Verb(
        "check PROGRAM [KEY=VALUE ...]",
        "read the program, find its files, match its globs; run nothing",
        check,
        f"{CHANGES}\nExit code 0: the program can begin; 2 comes with what must change first.",
    ),
    "plan": Verb(
        "plan PROGRAM [--device h100 --n 8] [--measure] [KEY=VALUE ...]",
        "memory, operations and time of each training stage, and whether it fits; reads no weight",
        plan,
        parses_help=True,
    ),
    "data": Verb(
        "data PROGRAM [KEY=VALUE ...]",
        "lengths, targets, repeated and held-out samples, template and estimates of its data",
        data,
        f"Reads no weight and trains nothing.\n{CHANGES}",
    ),
    "schema": Verb(
        "schema",
        "the JSON Schema of programs",
        schema,
        "Editors that read a schema complete and check programs with it.",
    ),
    "show-sample": Verb(
        "show-sample PROGRAM [-n 3] [--data NAME] [KEY=VALUE ...]",
        "text, ids and mask of the first samples of its data",
        show_sample,
        parses_help=True,
    ),
    "download": Verb(
        "download REPO [--to DIR] [--revision R]",
        "fetch a model folder or an adapter from the Hugging Face Hub",
        _download,
        parses_help=True,
    ),
    "finish": Verb(
        "finish RUN [--best]",
        "end the training of a stopped run with its saved state, and run the stages after it",
        _finish,
        parses_help=True,
        runs_stages=True,
    ),
    "merge": Verb(
        "merge ADAPTER [--to FOLDER]",
        "fold an adapter, or what a run has trained, into its base: a model folder",
        _merge,
        parses_help=True,
        runs_stages=True,
    ),
    "inspect": Verb(
        "inspect FOLDER",
        "what a model, an adapter or a run folder holds; reads no weight",
        inspect,
        "Exit code 2 means that a file is missing or damaged; which one is told on stderr.",
    ),
    "chat": Verb(
        "chat FOLDER [--OPTION VALUE]",
        "talk with a model, an adapter, a run or demo",
        _chat,
        parses_help=True,
    ),
    **RESULT_VERBS,
    "cache": Verb("cache [clear]", "where tokenized data is kept; clear removes it", _cache),
    "skill": Verb("skill", "a page that tells a coding agent how to use all of this", skill),
}


def program_file(name: str) -> Path:
    """File of a program by path or shipped name; InputError with what another word may mean."""
    path = paths.program_file(name)
    if path.is_file() and path.suffix.casefold() in YAML_SUFFIXES:
        refuse(f"{path} {yaml_hint(path, typed_name())}")
    if path.is_file():
        return path
    what = f"{cut(name)} is no file, no verb and no shipped program"
    known_elsewhere = hint(name, typed_name())
    if known_elsewhere is not None:
        refuse(f"{what}; {known_elsewhere}")
    if path.is_dir():
        place = cut(name)
        is_run = (path / "program.toml").is_file()
        remedy = f"{place}/program.toml" if is_run else f"PROGRAM model.path={place}"
        refuse(f"{place} is a {'run' if is_run else 'folder'}, expected a program; write {remedy}")
    known = [*VERBS, *paths.shipped()]
    near = nearest(name.removeprefix("programs/").removesuffix(".toml"), known)
    separator = " " if near else "; "
    lists = f"`{typed_name()} ls` lists the programs, --help the verbs"
    return refuse(f"{what}{near}{separator}{lists}")


def _program_of(verb: str, words: Sequence[str]) -> Path:
    if not words:
        refuse(f"{verb} without a program, expected {VERBS[verb].usage}")
    return program_file(words[0])


def refuse(message: str) -> Never:
    """InputError of the command line itself."""
    raise InputError(f"minitune: {message}")
