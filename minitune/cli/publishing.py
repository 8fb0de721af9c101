"""Verbs upload and register: what a run has saved, on the Hugging Face Hub or in a registry."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minitune.cli.command_result import CommandResult
from minitune.cli.model_folders import result_of
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.io.paths import locate, user_path
from minitune.programs.card.model_card import Subject, model_card
from minitune.programs.card.opened_with import kind_of
from minitune.programs.card.publication import card_text, publish, run_of
from minitune.programs.page.run_files import RunFiles, read_run
from minitune.programs.registering import check_name, move
from minitune.programs.registering import register as registered
from minitune.programs.trained_state import TrainedState
from minitune.registry.hub_upload import Target


def upload(words: Sequence[str]) -> CommandResult:
    """Upload a folder or a .gguf file and return where it lies, or print its card and return it.

    InputError for what is no model, and for a repository, token or network that won't do.
    """
    options = _parser().parse_args(words)
    place = saved_place(options.folder, "upload")
    run = run_at(place, options.run)
    subject = Subject(place, options.repo, run, options.base, options.samples)
    if options.print_card:
        text = model_card(subject)
        sys.stdout.write(text)
        return CommandResult({"card": text})
    target = Target(options.repo, options.revision, options.private)
    card = card_text(user_path(options.card)) if options.card is not None else None
    done = publish(subject, target, card, tell)
    sys.stdout.write(f"{done.address} at {done.commit[:12]}, {done.n_sent} files sent\n")
    return CommandResult(done._asdict())


def register(words: Sequence[str]) -> CommandResult:
    """Register a folder or a file, or move aliases to a version, and return the version.

    InputError for what is no model, and for a registry, name or version that won't do.
    """
    options = _register_parser().parse_args(words)
    aliases = options.alias or []
    if options.name is None:
        if not aliases:
            wanted = "expected register FOLDER NAME, or register NAME:VERSION --alias ALIAS"
            raise InputError(f"register: {options.folder} alone, {wanted}; correct the command")
        done = move(options.folder, aliases)
    else:
        name = check_name(options.name)
        place = saved_place(options.folder, "register")
        subject = Subject(place, name.name, run_at(place, options.run), options.base)
        done = registered(name, subject, aliases, tell, update=options.update)
    named = f", {', '.join(aliases)}" if aliases else ""
    is_old = options.name is not None and not done.is_new
    note = " (these files were registered already)" if is_old else ""
    sys.stdout.write(f"{done.name}{named}{note}\n")
    return CommandResult({**done._asdict(), "aliases": aliases})


def tell(text: str) -> None:
    """Write a line on what is done, beside the result on stdout."""
    sys.stderr.write(f"{text}\n")


def saved_place(word: str, verb: str) -> Path:
    """Place of a file, a folder, or what a run has saved; InputError for a run that has not,
    and for what is no model."""
    if locate(word).is_file():
        kind_of(locate(word))
        return locate(word)
    found = result_of(word, verb)
    if isinstance(found, TrainedState):
        remedy = f"minitune merge {word}, or minitune finish {found.run}"
        raise InputError(
            f"{verb}: {word} is {found.describe()}, expected a model or an adapter that was saved; "
            f"write {remedy} first"
        )
    kind_of(locate(found))
    return locate(found)


def run_at(place: Path, given: str | None) -> RunFiles | None:
    """Run that saved what lies at a place: the one that is named, else that of its folder."""
    return read_run(user_path(given)) if given is not None else run_of(place)


def _parser() -> OptionParser:
    description = "Upload a model, an adapter or a .gguf file to the Hugging Face Hub, by a commit."
    epilog = (
        "HF_TOKEN is the token. A README.md in FOLDER is the card; without one, a card is made."
    )
    parser = OptionParser("upload", description=description, epilog=epilog)
    folder = "what a run has saved: a model, an adapter, a .gguf file, or the run itself"
    parser.add_argument("folder", metavar="FOLDER", help=folder)
    parser.add_argument(
        "repo", metavar="OWNER/NAME", help="repository; it is made if there is none"
    )
    parser.add_argument("--private", action="store_true", help="for you alone, if it is new")
    branch = "branch that the commit is made on (default %(default)s)"
    parser.add_argument("--revision", metavar="R", default="main", help=branch)
    parser.add_argument("--base", metavar="OWNER/NAME", help="name of the base model at the Hub")
    parser.add_argument("--run", metavar="RUN", help="run that saved it, if it lies elsewhere")
    samples = "answers that the card shows (default %(default)s)"
    parser.add_argument("--samples", type=int, default=3, metavar="N", help=samples)
    parser.add_argument("--card", metavar="FILE", help="a card of your own")
    parser.add_argument(
        "--print-card", action="store_true", help="print the card, and send nothing"
    )
    return parser


def _register_parser() -> OptionParser:
    description = "Make what a run has saved a version of a registered model, or move aliases."
    epilog = "register NAME:VERSION --alias ALIAS has an alias name an earlier version again."
    parser = OptionParser("register", description=description, epilog=epilog)
    folder = "what a run has saved, or the run itself; with --alias alone, NAME:VERSION"
    parser.add_argument("folder", metavar="FOLDER", help=folder)
    name = "mlflow:NAME, wandb:ENTITY/PROJECT/NAME, azureml:NAME or hf:OWNER/NAME"
    parser.add_argument("name", metavar="NAME", nargs="?", help=name)
    alias = "that names the version from now on, such as best; may be repeated"
    parser.add_argument("--alias", metavar="ALIAS", action="append", help=alias)
    update = "make a new version of a content that has one"
    parser.add_argument("--update", action="store_true", help=update)
    parser.add_argument("--base", metavar="OWNER/NAME", help="name of the base model at the Hub")
    parser.add_argument("--run", metavar="RUN", help="run that saved it, if it lies elsewhere")
    return parser
