"""Show-sample verb: what a program would train on, token by token, before anything is loaded or
trained.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from minitune.cli.command_result import CommandResult
from minitune.cli.model_folders import bring_registered
from minitune.cli.options import OptionParser
from minitune.data import preference_rows
from minitune.data.encoded_rows import Refused
from minitune.data.readers import require_rows
from minitune.data.row_lengths import MOST_TOKENS
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.data.supervised import tokenized
from minitune.errors import InputError, nearest
from minitune.io.paths import locate
from minitune.programs import program
from minitune.programs.data_paths import located
from minitune.text.chat import Tokens, open_text
from minitune.text.template import Template, with_options
from minitune.text.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"  # around targets, so that they are seen without colour
TARGET, OTHER = "bold green", "dim"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")


def show(file: Path, words: Sequence[str], console: Console | None = None) -> CommandResult:
    """Print the first samples of a program's data: text, ids and mask, the targets marked; returns
    the same samples.

    words: overrides of the program, --n (samples a file), --data (a [data] table, all if absent).
    InputError for what the program, its tokenizer or its data have wrong.
    """
    options = _parser().parse_intermixed_args(words)
    if not 1 <= options.n <= sys.maxsize:
        raise InputError(f"show-sample: -n is {options.n}, expected 1 to {sys.maxsize}; correct it")
    asked = program.load(file, options.overrides)
    if options.data is not None and options.data not in asked.data:
        known = ", ".join(asked.data) or "none"
        raise InputError(
            f"show-sample: --data {options.data}, expected a [data] table: "
            f"{known}{nearest(options.data, [*asked.data])}"
        )
    folder = asked.model.tokenizer or asked.model.path
    if folder is None:
        raise InputError(
            f"show-sample: {file} has [model] config but no tokenizer, expected the folder that "
            "holds the tokenizer's files"
        )
    bring_registered(folder)
    text, template = open_text(locate(folder))
    template = with_options(template, asked.model.chat_template_kwargs, "[model]")
    screen = console or Console()
    screen.print(
        Text(f"template: {template.origin}; targets stand in {OPEN}{CLOSE}"), soft_wrap=True
    )
    shown: list[dict[str, Any]] = []
    for name, source in asked.data.items():
        if options.data in (None, name):
            # How long rows are to be is decided when all are read; here the first ones are.
            most = MOST_TOKENS if source.seq_len == "auto" else source.seq_len
            here = msgspec.structs.replace(located(source), seq_len=most)
            for part in here.parts():
                require_rows(part)
                shown += _show_file(screen, name, part, text, template, options.n)
    return CommandResult({"template": template.origin, "samples": shown})


def _parser() -> OptionParser:
    description = (
        "Show what a program would train on: text, ids and mask of the first samples of its data."
    )
    parser = OptionParser("show-sample PROGRAM", description=description)
    parser.add_argument(
        "-n",
        "--n",
        type=int,
        default=3,
        metavar="N",
        help="samples of each file (default %(default)s)",
    )
    parser.add_argument("--data", metavar="NAME", help="a [data] table; all of them if absent")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the program")
    return parser


def _show_file(
    screen: Console,
    name: str,
    source: Source,
    text: Tokenizer,
    template: Template,
    n: int,
) -> list[dict[str, Any]]:
    """Print the first samples of a file; returns them as JSON takes them."""
    refused: list[Refused] = []
    shown: list[dict[str, Any]] = []
    for where, samples in islice(_samples(source, text, template, refused), n):
        for kind, whole in samples:
            # Nothing predicts the first token.
            tokens = whole._replace(mask=[False, *whole.mask[1:]][: len(whole.ids)])
            n_targets = sum(map(bool, tokens.mask))
            counts = f"{len(tokens.ids):,} tokens, {n_targets:,} of them targets"
            title = f"\n{name} {where}{f' {kind}' if kind else ''}: {counts}{_fate(tokens, source)}"
            screen.print(Text(title, style="bold"), soft_wrap=True)
            for line in (*_unwritten(tokens), _text(tokens, text), _ids(tokens), _mask(tokens)):
                screen.print(line, soft_wrap=True)
            words = text.decode(tokens.ids, skip_special=False)
            named = {"data": name, "where": where, "kind": kind, "text": words}
            shown.append({**named, "ids": tokens.ids, "mask": list(map(float, tokens.mask))})
    for one in refused:
        kind = "malformed" if one.is_malformed else "refused"
        screen.print(
            _visible(f"\n{name} {one.where} is left out ({kind}): {one.reason}"), soft_wrap=True
        )
    return shown


def _samples(
    source: Source,
    text: Tokenizer,
    template: Template,
    refused: list[Refused],
) -> Iterator[tuple[str, list[tuple[str, Tokens]]]]:
    """Yield ("file:line", [(what it is to its loss, tokens)]) of each row."""
    if source.format not in PREFERENCE_FORMATS:
        for where, tokens in tokenized(source, text, template, refused):
            yield where, [("", tokens)]
        return
    words = ("chosen", "rejected") if source.format == "pairs" else ("desirable", "undesirable")
    for where, answers in preference_rows.tokenized(source, text, template, refused):
        yield where, [(words[not better], tokens) for tokens, better in answers]


def _unwritten(tokens: Tokens) -> list[Text]:
    """Line on what the messages hold and the template does not write, if there is anything."""
    counts = Counter(tokens.unwritten)
    if not counts:
        return []
    named = ", ".join(f"{key} of {n:,} message{'s' * (n > 1)}" for key, n in counts.items())
    return [_visible(f"not written by the template: {named}")]


def _fate(tokens: Tokens, source: Source) -> str:
    """Words on a sample that is not trained on as it is, or nothing."""
    if len(tokens.ids) > source.max_seq_len:
        return (
            f" (longer than seq_len = {source.max_seq_len}: "
            f"{'dropped' if source.overlong == 'drop' else 'cut there'})"
        )
    return "" if any(tokens.mask) else " (left out: nothing in it is trained)"


def _runs(tokens: Tokens) -> Iterator[tuple[bool, int, int]]:
    """(trained, start, end) of the tokens that stand together and are all trained, or all not."""
    start = 0
    for trained, run in groupby(map(bool, tokens.mask)):
        end = start + len(list(run))
        yield trained, start, end
        start = end


def _text(tokens: Tokens, text: Tokenizer) -> Text:
    shown, before = Text(), ""
    for trained, _, end in _runs(tokens):
        # from the start on: what a token adds depends on those before
        whole = text.decode(tokens.ids[:end], skip_special=False)
        _mark(shown, whole[len(before) :], trained)
        before = whole
    return shown


def _ids(tokens: Tokens) -> Text:
    shown = Text("ids ", style=OTHER)
    for trained, start, end in _runs(tokens):
        _mark(shown.append(" "), " ".join(map(str, tokens.ids[start:end])), trained)
    return shown


def _mask(tokens: Tokens) -> Text:
    shown = Text("mask ", style=OTHER)
    for weight, run in groupby(map(float, tokens.mask)):
        _mark(shown.append(" "), f"{len(list(run))} x {weight:g}", weight > 0)
    return shown


def _mark(shown: Text, piece: str, trained: bool) -> None:
    piece = _without_controls(piece)
    shown.append(f"{OPEN}{piece}{CLOSE}" if trained else piece, style=TARGET if trained else OTHER)


def _visible(line: str) -> Text:
    """Line that data is a part of, in plain style."""
    return Text(_without_controls(line), style=OTHER)


def _without_controls(text: str) -> str:
    """Text with pictures of its control characters, so that data can't steer a terminal."""
    return CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])), text)
