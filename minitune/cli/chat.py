"""Chat verb: a conversation in the terminal, or one turn a line from a pipe."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from minitune import seeds
from minitune.algorithms.objective import apply_trainable
from minitune.cli.command_result import CommandResult
from minitune.cli.model_folders import bring_registered, open_model_folder
from minitune.cli.options import OptionParser
from minitune.errors import InputError
from minitune.inference.generate import stream
from minitune.inference.sampling import Sampling
from minitune.inference.stop_strings import pieces
from minitune.programs.loading import ModelSource, load
from minitune.programs.state import LoadedModel
from minitune.text.chat import encode_prompt
from minitune.text.template import Message

COMMANDS = (
    "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer, "
    "/help shows this"
)


def chat(words: Sequence[str]) -> CommandResult:
    """Talk with a model: turns from stdin, answers to stdout as they are written, all else to
    stderr; returns the turns.

    InputError for options, folders and templates that do not fit.
    """
    options = vars(_parser().parse_args(words))
    sampling = _sampling(options)
    if options["max_new_tokens"] < 1:
        raise InputError(
            f"chat: --max-new-tokens is {options['max_new_tokens']}, expected at least 1; correct "
            "it"
        )
    loaded = load(_source(options), Path("run"), options["seed"])
    opening = (
        [] if options["system"] is None else [{"role": "system", "content": options["system"]}]
    )
    # A template that takes no system message refuses it here, before anyone types.
    encode_prompt(loaded.tokenizer, loaded.template, [*opening, {"role": "user", "content": "?"}])

    messages = opening
    turns: list[dict[str, str]] = []
    if sys.stdin.isatty():
        _tell(COMMANDS)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = opening
            _tell("the conversation is forgotten")
        elif line.startswith("/") and line[1:].isalpha():
            _tell(COMMANDS if line == "/help" else f"{line} is no command: {COMMANDS}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            seed = seeds.derive(options["seed"], "turn", len(turns))
            answer = _answer(loaded, asked, sampling, seed, options["max_new_tokens"])
            turns.append({"prompt": line, "answer": answer})
            if answer:
                messages = [*asked, {"role": "assistant", "content": answer}]
    return CommandResult({"turns": turns})


def _source(options: Mapping[str, Any]) -> ModelSource:
    deltas = options["deltas"] and bring_registered(options["deltas"])
    folder = open_model_folder(options["folder"], deltas, "chat")
    if folder.note is not None:
        _tell(f"opening {folder.note}")
    kwargs = _template_kwargs(options)
    return ModelSource(path=folder.model, deltas=folder.adapter, chat_template_kwargs=kwargs)


def _parser() -> OptionParser:
    description = "Talk with a model, on a terminal or with one turn a line on stdin."
    parser = OptionParser("chat", description=description, epilog=COMMANDS)
    parser.add_argument(
        "folder", metavar="FOLDER", help="a model folder, an adapter, a run folder, or demo"
    )
    parser.add_argument("--deltas", metavar="FOLDER", help="a PEFT adapter to put on the model")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument(
        "--chat-template-kwargs",
        default="{}",
        metavar="JSON",
        help="such as '{\"enable_thinking\": false}'",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the draws (default %(default)s)"
    )
    return parser


def _add_sampling(parser: OptionParser) -> None:
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): always the likeliest token",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that reach probability P",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens at least P times as likely as the likeliest",
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less"
    )


def _template_kwargs(options: Mapping[str, Any]) -> dict[str, Any]:
    text = options["chat_template_kwargs"]
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InputError(
            f"chat: --chat-template-kwargs is {text!r} ({error}), expected a JSON object; correct "
            "the command"
        ) from None


def _sampling(options: Mapping[str, Any]) -> Sampling:
    try:
        return msgspec.convert(
            {name: options[name] for name in Sampling.__struct_fields__}, Sampling
        )
    except msgspec.ValidationError as error:
        # msgspec ends a message about one field with its name; a check of several fields says all
        # of it itself.
        reason, _, name = str(error).rstrip("`").partition(" - at `$.")
        if name:
            option = f"--{name.replace('_', '-')}"
            reason = f"{option} is {options[name]}, expected {reason.removeprefix('Expected ')}"
        raise InputError(f"chat: {reason}; correct the command") from None


def _lines() -> Iterator[str]:
    """Lines that are typed or piped, stripped, until the end."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # some systems have none
            import readline  # noqa: F401 - gives input() its line editing and history
    while True:
        try:
            # bytes that are no UTF-8 come as surrogates, which no tokenizer takes
            yield input("> " if terminal else "").encode("utf-8", "replace").decode().strip()
        except KeyboardInterrupt:
            _tell("\n/exit or Ctrl-D ends")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(
                f"chat: the input is not UTF-8 ({error}), expected UTF-8 text; convert it"
            ) from None


def _answer(
    loaded: LoadedModel,
    asked: Sequence[Message],
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
) -> str:
    """CommandResult of the model, written to stdout while it comes; Ctrl-C cuts it short."""
    ids = encode_prompt(loaded.tokenizer, loaded.template, asked)
    room = loaded.model.config.max_positions - len(ids)
    if room < 1:
        limit = loaded.model.config.max_positions
        _tell(
            f"the conversation has {len(ids)} tokens and the model takes {limit}: /reset forgets it"
        )
        return ""
    params = apply_trainable(loaded.params, loaded.trainable, loaded.lora)
    stops = frozenset(loaded.stop_ids)
    steps = stream(
        loaded.model,
        params,
        [ids],
        sampling=sampling,
        row_seeds=[seed],
        max_new_tokens=min(max_new_tokens, room),
    )
    tokens = takewhile(lambda token: token not in stops, (int(step) for step in steps))
    said: list[str] = []
    try:
        for piece in pieces(
            tokens, lambda ids: loaded.tokenizer.decode(ids, skip_special=True), ()
        ):
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(said)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
