"""Verb verify: what was written, opened by another program and compared with minitune."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minitune.cli.command_result import CommandResult
from minitune.cli.model_folders import bring_registered, result_of
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.interop.artefacts import FORMATS, FormatName, format_of, require_reader
from minitune.io.paths import PACKAGE, is_registered_name, locate
from minitune.programs.trained_state import TrainedState
from minitune.programs.verification import (
    PROMPTS,
    Questions,
    Reference,
    as_record,
    base_of_adapter,
    opened,
    require_agreement,
    write_figures,
)
from minitune.programs.verification import verify as figures_of


def verify(words: Sequence[str]) -> CommandResult:
    """Compare what the words name with minitune, say the figures, write them beside it, and return
    them.

    InputError where they differ by more than the format allows, for a reader that is not installed,
    and for what is no artefact.
    """
    options = _parser().parse_args(words)
    if options.max_new_tokens < 1:
        found = f"--max-new-tokens is {options.max_new_tokens}"
        raise InputError(f"verify: {found}, expected at least 1; correct it")
    word = bring_registered(options.path)
    path = _place(word)
    name = format_of(path)
    require_reader(name)
    reference, base = _reference(path, name, options.against)
    asked = Questions(options.prompt or PROMPTS, options.max_new_tokens)
    figures = figures_of(path, name, reference, asked, base)
    lines = figures.lines()
    # the demo is no result of the user's, and a registered version keeps the files that it has
    if not (path.is_relative_to(PACKAGE) or is_registered_name(word)):
        lines.append(f"figures in {write_figures(path, figures)}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
    require_agreement(figures)
    return CommandResult(as_record(figures))


def _parser() -> OptionParser:
    description = (
        "Open a model folder, an adapter, a GGUF, an ONNX or an ExecuTorch file with the program "
        "that it is for, and hold its logits and its greedy text against minitune's."
    )
    epilog = "The figures are written to verify.json in the folder, or PATH.verify.json."
    parser = OptionParser("verify", description=description, epilog=epilog)
    what = "a folder or a file that a save or export stage wrote, or a run"
    parser.add_argument("path", metavar="PATH", help=what)
    against = "model folder that it was made of (default: PATH itself, as minitune reads it)"
    parser.add_argument("--against", metavar="FOLDER", help=against)
    prompt = "a text that both are asked; may be given several times"
    parser.add_argument("--prompt", action="append", metavar="TEXT", help=prompt)
    n_tokens = "tokens of each greedy answer (default %(default)s)"
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help=n_tokens)
    return parser


def _place(word: str) -> Path:
    """Folder or file that a word means: of a run, what it saved."""
    place = locate(word)
    if not place.exists():
        raise InputError(f"verify: {word} does not exist, expected a folder or file; correct it")
    if place.is_file():
        return place
    result = result_of(word, "verify")
    if isinstance(result, TrainedState):
        found = f"verify: {word} is a training state, which other programs do not open"
        raise InputError(f"{found}, expected what a save stage wrote; run `minitune merge {word}`")
    return locate(result)


def _reference(path: Path, name: FormatName, against: str | None) -> tuple[Reference, Path | None]:
    """(model that an artefact is held against, folder below an adapter)."""
    base = base_of_adapter(path) if name == "adapter" else None
    if against is not None:
        against = bring_registered(against)
        return opened(against, None, same_weights=False), base
    if base is not None:
        return opened(str(base), str(path), same_weights=True), base
    if FORMATS[name].is_read:
        return opened(str(path), None, same_weights=True), None
    raise InputError(
        f"verify: {path} is {name}, which minitune does not read, expected the model folder that "
        "it was made of; give it with --against FOLDER"
    )
