"""Conversations as tokens: one function for training, evaluation and generation, and the exact training mask.

Templates come from model folders, so they run in a sandbox with bounded loops. Messages come from data files, so what
they say is never read as a special token.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.text.escaping import escape_special_tokens
from minitune.text.template import Message, Template, Tool, compile_template, render, told
from minitune.text.tokenizer import Tokenizer
from minitune.text.turns import Conversation, TrainOn, assistant_turns
from minitune.text.vocabulary import json_object

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
    """The folder's template, else the built-in ChatML if the tokenizer has its tokens, else a plain built-in one."""
    names, file, config = tokenizer.special_names, folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return compile_template(file.read_text(encoding="utf-8"), names, str(file))
        except UnicodeDecodeError as error:
            raise InputError(f"chat: {file} is not UTF-8 ({error}), expected a Jinja template; fetch the file again") from None
    found = json_object(config).get("chat_template")
    tool_use = None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found, tool_use = named.get("default", named), named.get("tool_use")
    if isinstance(found, str):
        template = compile_template(found, names, f"{config} chat_template")
        if not isinstance(tool_use, str):
            return template
        return template._replace(tool_use=compile_template(tool_use, names, f"{config} chat_template tool_use"))
    if found is not None:
        raise InputError(
            f"chat: {config} chat_template is a {type(found).__name__}, expected a string or a list of named strings with "
            "one called default; write the template to chat_template.jinja"
        )
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        opening = "{{ bos_token }}" if tokenizer.add_bos and tokenizer.bos_id is not None else ""
        return compile_template(opening + CHATML, names, "built-in ChatML template")
    if tokenizer.eos_id is None:
        raise InputError(
            f"chat: {folder} has no chat template and its tokenizer no eos_token, expected one that ends a turn; "
            "write a chat_template.jinja or name the eos_token in tokenizer_config.json"
        )
    return compile_template(PLAIN, names, "built-in plain template")


def encode_chat(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    train_on: TrainOn = "assistant",
) -> Tokens:
    """Ids of a conversation, and which are trained: what stands in {% generation %} or, in a template without it, every turn
    of the assistant with its end-of-turn token; the last of them only; or every token.

    InputError if the template writes an assistant turn differently from what its generation prompt promised, or
    ends it with no special token.
    """
    return _encode(tokenizer, template, messages, tools, False, train_on)


def encode_prompt(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Message], *, tools: Sequence[Tool] = ()
) -> list[int]:
    """Ids that generation starts from: the conversation and the opening of an assistant turn."""
    return _encode(tokenizer, template, messages, tools, True, None).ids


def _encode(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    add_generation_prompt: bool,
    train_on: TrainOn | None,
) -> Tokens:
    # Special tokens come from the template alone: it writes the bos, where one is wanted.
    shielded, shielded_tools, restore = escape_special_tokens(messages, tools, tokenizer)
    conversation = Conversation(template, shielded, shielded_tools)
    text = conversation.text(len(messages), add_generation_prompt)
    if restore:
        plain = render(template, messages, tools=tools, add_generation_prompt=add_generation_prompt)
        if plain != text.translate(restore):
            raise InputError(
                f"chat: {template.origin} reads a special token in the text of a message, expected it to be copied as text; "
                f"remove the special tokens from the content of {told(messages)}"
            )
    # The text is cut where a turn of the assistant starts, as generation cuts it, and where it ends.
    turns = assistant_turns(tokenizer, conversation, text, add_generation_prompt, train_on)
    borders = [0, *(border for turn in turns for border in (turn.start, turn.end)), len(text)]
    ids, mask = [], []
    for n, (start, end) in enumerate(pairwise(borders)):
        stretch = tokenizer.encode_span(text[start:end], opens=start == 0, restore=restore)
        ids += stretch
        mask += [train_on == "all" or (n % 2 == 1 and turns[n // 2].trained)] * len(stretch)
    return Tokens(ids, mask)


def stop_ids(tokenizer: Any, template: Template) -> list[int]:
    """The tokens that end an answer: the special token that the template puts after an assistant's turn, and the end of text."""
    turn = encode_chat(tokenizer, template, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    last = [i for i, trained in zip(turn.ids, turn.mask, strict=True) if trained][-1]
    ends = [last] if last in tokenizer.special.values() else []
    return list(dict.fromkeys([*ends, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))
