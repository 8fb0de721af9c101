"""Conversations as tokens: one function for training, evaluation and generation, and the exact
training mask.

Templates come from model folders, so they run in a sandbox with bounded loops. Messages come from
data files, so what they say is never read as a special token.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from minitune.errors import InputError
from minitune.text.conversation import Conversation, TrainOn, Turn, turn_weights, without_weights
from minitune.text.escaping import escape_special_tokens
from minitune.text.folder_files import DEFAULT, TOOL_USE, template_texts
from minitune.text.forms import write
from minitune.text.template import Message, Template, Tool, compile_template, describe_roles
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from minitune.text.turns import appends_prompt, assistant_turns

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
{%- elif message.role == 'assistant' %}\
{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('role ' ~ message.role ~ ', expected system, user or assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""


class Tokens(NamedTuple):
    """Token ids of a conversation, and what each counts in the loss.

    mask: True for a token that is trained, or the weight of its turn where that is not 1.
    unwritten: keys of messages that the template does not write, one entry for each message.
    """

    ids: list[int]
    mask: Sequence[bool | float]
    unwritten: Sequence[str] = ()


def open_text(folder: Path, n_rows: int | None = None) -> tuple[Tokenizer, Template]:
    """(tokenizer, chat template) of a Hugging Face folder, for a model of n_rows embeddings.

    InputError for files that are missing or damaged, and for a tokenizer of another model: one that
    has more tokens than rows, other than added ones.
    """
    tokenizer = open_tokenizer(folder)
    if n_rows is not None:
        tokenizer = tokenizer.with_rows(n_rows, str(folder))
    return tokenizer, open_template(folder, tokenizer)


def open_template(folder: Path, tokenizer: Tokenizer) -> Template:
    """Read a folder's chat template; without one, the built-in ChatML if the tokenizer has its
    tokens, else a plain one.

    Of several, `default` is read, and `tool_use` for conversations with tools. InputError for a
    template that can't be read or compiled, and for a tokenizer without a token that ends a turn.
    """
    named = template_texts(folder)
    if DEFAULT not in named:
        return _built_in(folder, tokenizer)
    compiled = {
        name: compile_template(named[name].source, tokenizer.special_names, named[name].origin)
        for name in (DEFAULT, TOOL_USE)
        if name in named
    }
    return compiled[DEFAULT]._replace(tool_use=compiled.get(TOOL_USE))


def _built_in(folder: Path, tokenizer: Tokenizer) -> Template:
    """Built-in template for a folder without one."""
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        bos = "{{ bos_token }}" if tokenizer.add_bos and tokenizer.bos_id is not None else ""
        return compile_template(bos + CHATML, tokenizer.special_names, "built-in ChatML template")
    if tokenizer.eos_id is None:
        raise InputError(
            f"chat: {folder} has no chat template and its tokenizer no eos_token, expected one "
            "that ends a turn; write a chat_template.jinja or name the eos_token in "
            "tokenizer_config.json"
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

    train_on: "assistant" trains what stands in {% generation %} or, in a template without it, every
    turn of the assistant with its end-of-turn token; "last" only the last of them; "all" every
    token. A turn counts as much as its message says under weight, train, trainable or loss.

    InputError if the template writes an assistant turn differently from what its generation prompt
    promised, or ends it with no special token, and if it leaves out something that the messages or
    tools hold.
    """
    return _encode(tokenizer, template, messages, tools, False, train_on)


def encode_prompt(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Ids that generation starts from: the conversation and the generation prompt, which begins an
    assistant turn.
    """
    return _encode(tokenizer, template, messages, tools, True, None).ids


def _encode(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    add_generation_prompt: bool,
    train_on: TrainOn | None,
) -> Tokens:
    weights = turn_weights(messages, train_on)
    trained = [n for n, weight in weights.items() if weight]
    if train_on == "all":
        trained = list(range(len(messages)))
    messages = without_weights(messages)
    # Special tokens come from the template alone, bos included where one is wanted.
    escaped, escaped_tools, restore = escape_special_tokens(messages, tools, tokenizer)
    conversation = Conversation(template, escaped, escaped_tools)
    form, text, lost = write(conversation, add_generation_prompt, trained)
    conversation = conversation._replace(messages=form(escaped))
    if restore:
        unescaped = Conversation(template, form(messages), tools)
        _refuse_read_tokens(unescaped, text.translate(restore), add_generation_prompt)
    # Where every token is trained, it doesn't matter where the turns are.
    are_required = train_on != "all" or any(weight != 1 for weight in weights.values())
    turns = assistant_turns(
        tokenizer,
        conversation,
        text,
        add_generation_prompt,
        weights,
        are_required,
    )
    if train_on is not None and turns and _is_prompt_appended(conversation, turns[-1], text):
        text = text[: turns[-1].end]
    ids, mask = _encode_spans(tokenizer, text, turns, restore, 1.0 if train_on == "all" else 0.0)
    return Tokens(ids, mask, [one.key for one in lost])


def _refuse_read_tokens(conversation: Conversation, text: str, add_generation_prompt: bool) -> None:
    """InputError if a template looks for a special token in a message (to split at it, for one).

    text: what it writes where none is to be found.
    """
    messages = conversation.messages
    if conversation.text(len(messages), add_generation_prompt) != text:
        raise InputError(
            f"chat: {conversation.template.origin} reads a special token in the text of a message, "
            "expected it to be copied as text; remove the special tokens from the content of "
            f"{describe_roles(messages)}"
        )


def _is_prompt_appended(conversation: Conversation, last_turn: Turn, text: str) -> bool:
    """Return True if a generation prompt that nobody asked for follows the assistant's last
    message.
    """
    n = len(conversation.messages)
    is_last = conversation.messages[-1].get("role") == "assistant"
    if not is_last or text[last_turn.end :].strip() == "":
        return False
    with_prompt = conversation.text(n, add_generation_prompt=True)
    return appends_prompt(conversation, n, text, with_prompt)


def _encode_spans(
    tokenizer: Tokenizer,
    text: str,
    turns: Sequence[Turn],
    restore: Mapping[int, str],
    weight_between: float,
) -> tuple[list[int], list[bool | float]]:
    """Ids of a text and the weight of each; weight_between: that of what stands between turns.

    The text is cut where a turn of the assistant starts, because generation continues from there,
    and where it ends. So every second span is a turn.
    """
    cuts = [0]
    for turn in turns:
        cuts += [turn.start, turn.end]
    ids: list[int] = []
    mask: list[bool | float] = []
    opens = True
    for n, (start, end) in enumerate(pairwise([*cuts, len(text)])):
        span = tokenizer.encode_span(text[start:end], starts_document=opens, restore=restore)
        opens = tokenizer.opens_after(text[start:end], opens)
        weight = turns[n // 2].weight if n % 2 == 1 else weight_between
        # True and False where they say it all: weights in between are rare.
        ids += span
        mask += [bool(weight) if weight in (0, 1) else weight] * len(span)
    return ids, mask
