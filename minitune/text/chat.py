"""Conversations as tokens: one function for training, evaluation and generation, and the exact training mask.

Templates come from model folders, so they run in a sandbox with bounded loops. Messages come from data files, so what
they say is never read as a special token.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.io.paths import is_present
from minitune.text.escaping import escape_special_tokens
from minitune.text.template import Message, Template, Tool, compile_template, describe_roles, render
from minitune.text.tokenizer import Tokenizer
from minitune.text.turns import Conversation, TrainOn, assistant_turns

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('role ' ~ message.role ~ ', expected system, user or assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""


class Tokens(NamedTuple):
    """Token ids of a conversation, and for each whether it is trained."""

    ids: list[int]
    mask: list[bool]


def open_template(folder: Path, tokenizer: Tokenizer) -> Template:
    """Read a folder's chat template; without one, the built-in ChatML if the tokenizer has its tokens, else a plain one.

    InputError for a template that can't be read or compiled, and for a tokenizer without a token that ends a turn.
    """
    names = tokenizer.special_names
    file = folder / "chat_template.jinja"
    if is_present(file):
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"chat: {file} is not UTF-8 ({error}), expected a Jinja template; fetch the file again") from None
        return compile_template(source, names, str(file))
    return _template_of_config(folder / "tokenizer_config.json", names) or _built_in(folder, tokenizer)


def _template_of_config(config: Path, names: Mapping[str, str]) -> Template | None:
    """The chat_template of a tokenizer_config.json, None if there is none.

    It is a string, or a list of named ones, of which `default` and `tool_use` are read.
    """
    written = read_json_object(config, "chat", optional=True).get("chat_template")
    tool_use = None
    if isinstance(written, list):
        by_name = {entry.get("name"): entry.get("template") for entry in written if isinstance(entry, dict)}
        tool_use = by_name.get("tool_use")
        written = by_name.get("default", by_name)
    if written is None:
        return None
    if not isinstance(written, str):
        raise InputError(
            f"chat: {config} chat_template is a {type(written).__name__}, expected a string or a list of named strings with "
            "one called default; write the template to chat_template.jinja"
        )
    template = compile_template(written, names, f"{config} chat_template")
    if isinstance(tool_use, str):
        template = template._replace(tool_use=compile_template(tool_use, names, f"{config} chat_template tool_use"))
    return template


def _built_in(folder: Path, tokenizer: Tokenizer) -> Template:
    """A built-in template for a folder without one."""
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        bos = "{{ bos_token }}" if tokenizer.add_bos and tokenizer.bos_id is not None else ""
        return compile_template(bos + CHATML, tokenizer.special_names, "built-in ChatML template")
    if tokenizer.eos_id is None:
        raise InputError(
            f"chat: {folder} has no chat template and its tokenizer no eos_token, expected one that ends a turn; "
            "write a chat_template.jinja or name the eos_token in tokenizer_config.json"
        )
    return compile_template(PLAIN, tokenizer.special_names, "built-in plain template")


def encode_chat(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    train_on: TrainOn = "assistant",
) -> Tokens:
    """Encode a conversation, with the mask of the tokens that are trained.

    train_on: "assistant" trains what stands in {% generation %} or, in a template without it, every turn of the
    assistant with its end-of-turn token; "last" only the last of them; "all" every token.

    InputError if the template writes an assistant turn differently from what its generation prompt promised, or
    ends it with no special token.
    """
    return _encode(tokenizer, template, messages, tools, False, train_on)


def encode_prompt(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Message], *, tools: Sequence[Tool] = ()
) -> list[int]:
    """Ids that generation starts from: the conversation and the generation prompt, which begins an assistant turn."""
    return _encode(tokenizer, template, messages, tools, True, None).ids


def _encode(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    add_generation_prompt: bool,
    train_on: TrainOn | None,
) -> Tokens:
    # Special tokens come from the template alone, bos included where one is wanted.
    escaped, escaped_tools, restore = escape_special_tokens(messages, tools, tokenizer)
    conversation = Conversation(template, escaped, escaped_tools)
    text = conversation.text(len(messages), add_generation_prompt)
    if restore:
        # A template that looks for a special token in a message (to split at it, for one) would not find it.
        unescaped = render(template, messages, tools=tools, add_generation_prompt=add_generation_prompt)
        if unescaped != text.translate(restore):
            raise InputError(
                f"chat: {template.origin} reads a special token in the text of a message, expected it to be copied as text; "
                f"remove the special tokens from the content of {describe_roles(messages)}"
            )
    # The text is cut where a turn of the assistant starts, because generation continues from there, and where it
    # ends. So every second span is a turn.
    turns = assistant_turns(tokenizer, conversation, text, add_generation_prompt, train_on)
    cuts = [0]
    for turn in turns:
        cuts += [turn.start, turn.end]
    ids: list[int] = []
    mask: list[bool] = []
    for n, (start, end) in enumerate(pairwise([*cuts, len(text)])):
        span = tokenizer.encode_span(text[start:end], starts_document=start == 0, restore=restore)
        is_turn = n % 2 == 1
        trained = train_on == "all" or (is_turn and turns[n // 2].trained)
        ids += span
        mask += [trained] * len(span)
    return Tokens(ids, mask)


def stop_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Tokens that end an answer: the special token that the template puts after an assistant's turn, and eos."""
    turn = encode_chat(tokenizer, template, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    last_trained = [i for i, trained in zip(turn.ids, turn.mask, strict=True) if trained][-1]
    stops = []
    if last_trained in tokenizer.special.values():
        stops.append(last_trained)
    if tokenizer.eos_id is not None and tokenizer.eos_id not in stops:
        stops.append(tokenizer.eos_id)
    return stops
