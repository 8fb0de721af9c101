"""Parts of a conversation that a template leaves out, found by comparing what went in with what was
rendered.

A template may drop whatever it likes, and says nothing about it: the loss looks fine, and an empty
answer is trained in place of a tool call. So the rendered text is searched for all texts of the
conversation, one after the other. A short text may be there by chance: then the conversation is
rendered once more, with marks around its texts, and a text whose marks are gone was left out. Names
of arguments and values that are no strings are looked for as they are.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.text.conversation import Conversation
from minitune.text.template import REASONING_KEYS, Message, Tool

# A mark is a number between two characters of Unicode's private area, which stand in no message.
MARK = re.compile("\U000ffff0([0-9]+)\U000ffff1")
# Markup inside a text, such as <think>, which a template may split at and write anew: texts are
# marked between it.
MARKUP = re.compile(r"<[^<>\s]{1,40}>")
END_OF_THOUGHT = "</think>"
MIN_SOUGHT = 16  # characters of a text that no template and no other text holds by chance
# Keys of a message whose texts are marked.
WRITTEN_KEYS = ("role", "content", "tool_calls", *REASONING_KEYS)


class Unwritten(NamedTuple):
    """Something of a conversation that its template does not write.

    message: its number from 0, None for the tools. key: where it stands. is_fatal: training without
    it would teach something else than the data says; the rest is only counted. is_reasoning: it is
    what the assistant thought.
    """

    message: int | None
    key: str
    is_fatal: bool
    is_reasoning: bool = False

    def describe(self, messages: Sequence[Message]) -> str:
        """Describe it for an error message."""
        if self.message is None:
            return f"the {self.key}"
        role = messages[self.message].get("role")
        return f"the {self.key} of message {self.message + 1} ({role})"


class Text(NamedTuple):
    """Text of a conversation, or a value that is looked for as it is (then it has no marks)."""

    message: int | None
    key: str
    text: str
    is_reasoning: bool = False


def unwritten(
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
    trained: Sequence[int],
) -> list[Unwritten]:
    """Find what the rendered text of a conversation leaves out; trained: numbers of the messages
    that are trained.

    Reasoning that a template removes from turns that are not trained is no loss: that is how the
    model is served.
    """
    marked, marked_texts, plain_texts = _marked(conversation)
    missing = [one for one in plain_texts if not _stands_in(one.text, text)]
    if not _stand_in_order(marked_texts, text):
        missing += _without_marks(marked, marked_texts, text, add_generation_prompt)
    lost: list[Unwritten] = []
    for one in missing:
        is_fatal = not one.is_reasoning or one.message in trained
        lost.append(Unwritten(one.message, one.key, is_fatal, one.is_reasoning))
    lost += _unread_keys(conversation, text, add_generation_prompt)
    return list(dict.fromkeys(lost))


def _stand_in_order(texts: Sequence[Text], text: str) -> bool:
    """Return True if a text holds these, one after the other, and each is too long to be there by
    chance.

    Then nothing is lost, and it takes no further rendering to know that. Texts of tools may stand
    before the messages or after them.
    """
    end_of_message = end_of_tool = 0
    for one in texts:
        begin = end_of_tool if one.message is None else end_of_message
        start = text.find(one.text, begin)
        if len(one.text) < MIN_SOUGHT or start < 0:
            return False
        if one.message is None:
            end_of_tool = start + len(one.text)
        else:
            end_of_message = start + len(one.text)
    return True


def _without_marks(
    marked: Conversation,
    texts: Sequence[Text],
    text: str,
    add_generation_prompt: bool,
) -> list[Text]:
    """Texts whose marks are gone once the marked conversation is rendered."""
    try:
        rendered = marked.text(len(marked.messages), add_generation_prompt)
    except InputError:
        rendered = ""
    if MARK.sub("", rendered) != text:
        # The template looks into the texts and takes another way because of the marks.
        return [one for one in texts if not _stands_in(one.text, text)]
    # Each text has two marks, at its start and at its end.
    found = {int(number) for number in MARK.findall(rendered)}
    return [one for n, one in enumerate(texts) if not {2 * n, 2 * n + 1} <= found]


def _marked(conversation: Conversation) -> tuple[Conversation, list[Text], list[Text]]:
    """Conversation with marks, the texts that have them in the order of their numbers, and those
    that are not marked.
    """
    marker = _Marker([], [])
    messages = [marker.message(n, message) for n, message in enumerate(conversation.messages)]
    tools = [marker.tool(tool) for tool in conversation.tools]
    return conversation._replace(messages=messages, tools=tools), marker.marked, marker.plain


class _Marker(NamedTuple):
    """Copies values with marks in their texts; marked and plain collect what was marked and what is
    looked for.
    """

    marked: list[Text]
    plain: list[Text]

    def message(self, n: int, message: Message) -> Message:
        copy = dict(message)
        # Only the first of these keys is read. Templates write it before the content.
        key = next((key for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
        if key is not None:
            copy[key] = self.text(n, key, message[key], is_reasoning=True)
        content = message.get("content")
        if isinstance(content, str):
            copy["content"] = self.content(n, content)
        elif isinstance(content, list):
            copy["content"] = [self.part(n, number, part) for number, part in enumerate(content, 1)]
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            copy["tool_calls"] = [self.call(n, call) for call in calls]
        return copy

    def content(self, n: int, text: str) -> str:
        before, end, after = text.rpartition(END_OF_THOUGHT)
        thought = self.text(n, "reasoning in the content", before, is_reasoning=True)
        return thought + end + self.text(n, "content", after)

    def part(self, n: int, number: int, part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        if isinstance(part.get("text"), str):
            return {**part, "text": self.text(n, "content", part["text"])}
        kind = part.get("type") or "without a type"
        name = f"content part {number} ({kind})"
        self.plain.extend(Text(n, name, text) for text in _strings(part, skip=("type",)))
        return part

    def call(self, n: int, call: Any) -> Any:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping):
            return call
        copy = dict(inner)
        if "arguments" in inner:
            copy["arguments"] = self.argument(n, inner["arguments"])
        if isinstance(inner.get("name"), str):
            copy["name"] = self.text(n, "tool_calls", inner["name"])
        return {**call, "function": copy} if "function" in call else copy

    def argument(self, n: int, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(n, "tool_calls", value)
        if isinstance(value, Mapping):
            self.plain.extend(Text(n, "tool_calls", key) for key in value)
            return {key: self.argument(n, child) for key, child in value.items()}
        if isinstance(value, list):
            return [self.argument(n, child) for child in value]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.plain.append(Text(n, "tool_calls", str(value)))
        return value

    def tool(self, tool: Tool) -> Tool:
        inner = tool.get("function", tool)
        if not isinstance(inner, Mapping):
            return tool
        copy = dict(inner)
        for key in ("name", "description"):
            if isinstance(inner.get(key), str):
                copy[key] = self.text(None, "tools", inner[key])
        parameters = inner.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            self.plain.extend(Text(None, "tools", name) for name in properties)
        return {**tool, "function": copy} if "function" in tool else copy

    def text(self, n: int | None, key: str, text: str, is_reasoning: bool = False) -> str:
        """Copy a text with marks around each stretch between its markup."""
        pieces = []
        end = 0
        for match in MARKUP.finditer(text):
            pieces += [self.stretch(n, key, text[end : match.start()], is_reasoning), match.group()]
            end = match.end()
        return "".join([*pieces, self.stretch(n, key, text[end:], is_reasoning)])

    def stretch(self, n: int | None, key: str, text: str, is_reasoning: bool) -> str:
        # Templates may remove the whitespace at both ends, so the marks stand inside it.
        words = text.strip()
        if not words:
            return text
        number = 2 * len(self.marked)
        self.marked.append(Text(n, key, words, is_reasoning))
        before, _, after = text.partition(words)
        return f"{before}\U000ffff0{number}\U000ffff1{words}\U000ffff0{number + 1}\U000ffff1{after}"


def _strings(value: Any, skip: Sequence[str]) -> Iterator[str]:
    """Yield the strings in a JSON value, without those under the keys to skip; for none of them, an
    empty object's text.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            if key not in skip:
                yield from _strings(child, skip)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child, skip)


def _stands_in(words: str, text: str) -> bool:
    """Return True if a text holds these words as they are, or as JSON writes them."""
    spellings = [json.dumps(words, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]
    return any(spelling in text for spelling in (words, *spellings))


def _unread_keys(
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
) -> list[Unwritten]:
    """Other keys of messages that change nothing in the text, such as a name or an id; they are
    only counted.
    """

    def same_without(keys: set[str]) -> bool:
        return _same_without(keys, conversation, text, add_generation_prompt)

    keys = {key for message in conversation.messages for key in message if key not in WRITTEN_KEYS}
    unread = keys if same_without(keys) else {key for key in keys if same_without({key})}
    numbered = enumerate(conversation.messages)
    return [Unwritten(n, key, False) for n, message in numbered for key in message if key in unread]


def _same_without(
    keys: set[str],
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
) -> bool:
    """Return True if the template writes the same text without these keys of all messages."""
    if not keys:
        return False
    messages: list[Message] = []
    for message in conversation.messages:
        messages.append({key: value for key, value in message.items() if key not in keys})
    other = conversation._replace(messages=messages)
    try:
        return other.text(len(messages), add_generation_prompt) == text
    except InputError:
        return False
