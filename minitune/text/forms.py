"""Forms of a conversation: templates differ in how they want contents and the arguments of tool
calls.

A template may join strings where a message holds a list of parts, or the other way round, and it
may want the arguments of a call as an object or as its JSON text. Servers look at the template and
hand messages over in the form that it reads; here the forms are tried in order, and the first is
taken in which nothing is lost.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.text.conversation import Conversation
from minitune.text.template import Message
from minitune.text.unwritten import Unwritten, unwritten

Form = Callable[[Sequence[Message]], list[Message]]


# Part of a content as Python or JSON prints it.
PRINTED_PART = re.compile(r"""\{['"]type['"]: ['"]text['"]""")
RENDERS_NOTHING = 1_000_000  # more than any count of losses


class Written(NamedTuple):
    """Text that a template writes of a conversation in the form that it reads, and what the text
    leaves out.
    """

    form: Form
    text: str
    unwritten: list[Unwritten]


def write(
    conversation: Conversation,
    add_generation_prompt: bool,
    trained: Sequence[int],
) -> Written:
    """Render a conversation in the first form that loses nothing; trained: numbers of the messages
    that are trained.

    InputError if the template renders none without a loss.
    """
    refusals: list[tuple[int, InputError]] = []
    for form in _forms(conversation.messages):
        formed = conversation._replace(messages=form(conversation.messages))
        try:
            text = formed.text(len(formed.messages), add_generation_prompt)
            _refuse_printed_parts(formed, text)
        except InputError as error:
            refusals.append((RENDERS_NOTHING, error))
            continue
        lost = unwritten(formed, text, add_generation_prompt, trained)
        fatal = [one for one in lost if one.is_fatal]
        if not fatal:
            return Written(form, text, lost)
        refusals.append((len(fatal), _loss(formed, fatal)))
    # The form that comes nearest says best what is missing.
    raise min(refusals, key=lambda refusal: refusal[0])[1]


def _refuse_printed_parts(conversation: Conversation, text: str) -> None:
    """InputError if a template prints a list of parts, where it should write their texts."""
    if not any(isinstance(message.get("content"), list) for message in conversation.messages):
        return
    if PRINTED_PART.search(text):
        raise InputError(
            f"chat: {conversation.template.origin} prints the parts of a content as a list, "
            "expected it to write their texts; write each content as one string"
        )


def _loss(conversation: Conversation, fatal: Sequence[Unwritten]) -> InputError:
    """Error that names what can't be trained because the template does not write it."""
    messages = conversation.messages
    named = ", ".join(dict.fromkeys(one.describe(messages) for one in fatal[:3]))
    more = f" and {len(fatal) - 3} more" if len(fatal) > 3 else ""
    last = max((n for n, one in enumerate(messages) if one.get("role") == "assistant"), default=-1)
    if all(one.is_reasoning and one.message != last for one in fatal):
        advice = 'set turns = "each" to train every answer as it is served, or train_on = "last"'
    else:
        advice = "take a template that writes it or remove it from the data"
    found = f"chat: {conversation.template.origin} does not write {named}{more}"
    return InputError(f"{found}, expected all that the messages hold; {advice}")


def _forms(messages: Sequence[Message]) -> Iterator[Form]:
    """Yield the forms that these messages can take, their own first."""
    contents: list[Form] = [list]
    if any(isinstance(message.get("content"), list) for message in messages):
        contents.append(_with_joined_parts)
    if any(isinstance(message.get("content"), str) for message in messages):
        contents.append(_with_parts)
    calls: list[Form] = [list]
    if any(message.get("tool_calls") for message in messages):
        calls = [_with_arguments(_as_object), _with_arguments(_as_text)]
    silent: list[Form] = [list]
    if any(message.get("tool_calls") and not message.get("content") for message in messages):
        silent += [_with_content_of_calls(content) for content in ("", None)]
    for steps in product(contents, silent, calls):
        yield _composed(steps)


def _composed(steps: Sequence[Form]) -> Form:
    """Apply forms one after the other."""

    def form(messages: Sequence[Message]) -> list[Message]:
        for step in steps:
            messages = step(messages)
        return list(messages)

    return form


def _with_joined_parts(messages: Sequence[Message]) -> list[Message]:
    """Messages whose text parts are one string, a line each; contents with other parts stay as they
    are.
    """
    return [_joined(message) for message in messages]


def _joined(message: Message) -> Message:
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "\n".join(map(str, texts))}


def _with_parts(messages: Sequence[Message]) -> list[Message]:
    """Messages whose contents are lists of parts."""
    return [_as_part(message) for message in messages]


def _as_part(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _with_content_of_calls(content: str | None) -> Form:
    """Form in which messages that hold calls and no content have this one."""

    def form(messages: Sequence[Message]) -> list[Message]:
        copies = [dict(message) for message in messages]
        for copy in copies:
            if copy.get("tool_calls") and not copy.get("content"):
                copy["content"] = content
        return [*copies]

    return form


def _with_arguments(convert: Callable[[Any], Any]) -> Form:
    """Form in which the arguments of calls are converted."""

    def call(value: Any) -> Any:
        inner = value.get("function", value) if isinstance(value, Mapping) else None
        if not isinstance(inner, Mapping) or "arguments" not in inner:
            return value
        inner = {**inner, "arguments": convert(inner["arguments"])}
        return {**value, "function": inner} if "function" in value else inner

    def form(messages: Sequence[Message]) -> list[Message]:
        copies = [dict(message) for message in messages]
        for copy in copies:
            if isinstance(copy.get("tool_calls"), list):
                copy["tool_calls"] = [call(value) for value in copy["tool_calls"]]
        return [*copies]

    return form


def _as_object(arguments: Any) -> Any:
    """Object that a JSON text holds, as servers give it to templates; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        decoded = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, dict) else arguments


def _as_text(arguments: Any) -> Any:
    """JSON text of an object, as OpenAI writes it; a text as it is."""
    if not isinstance(arguments, Mapping):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)
