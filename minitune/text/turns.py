"""Turns of the assistant in a rendered conversation: where each begins and ends, and which are trained."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from minitune.errors import InputError
from minitune.text.template import CLOSE, OPEN, Message, Template, Tool, render
from minitune.text.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "all"]  # every turn of the assistant, its last one, or every token


class _Turn(NamedTuple):
    start: int
    end: int
    trained: bool


class Conversation(NamedTuple):
    template: Template
    messages: Sequence[Message]
    tools: Sequence[Tool]

    def text(self, n: int, opened: bool, marked: bool = False) -> str:
        """The first n messages; opened: and the opening of the assistant's next turn."""
        return render(self.template, self.messages[:n], tools=self.tools, add_generation_prompt=opened, marked=marked)


def assistant_turns(
    tokenizer: Tokenizer, conversation: Conversation, text: str, opened: bool, train_on: TrainOn | None
) -> list[_Turn]:
    """Where the assistant's turns stand in the text, and which are trained as such; InputError for a trained one that can't be
    told from what is around it: another one is left out."""
    template, found = conversation.template, []
    if conversation.tools and template.tool_use is not None:
        template = template.tool_use
    turns = [i for i, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
    trained = {"assistant": turns, "last": turns[-1:]}.get(train_on or "", [])
    if template.marks:
        try:
            spans = [*_marked_spans(tokenizer, conversation, text, opened)]
            before = conversation._replace(messages=conversation.messages[: turns[-1]]) if turns else conversation
            marked = _marked_spans(tokenizer, before, before.text(len(before.messages), False), False)
            n_before = len([*marked]) if train_on == "last" else 0
        except InputError:
            if train_on in ("assistant", "last"):
                raise
            return []
        return [_Turn(*span, n >= n_before and train_on is not None) for n, span in enumerate(spans)]
    for i in turns:
        try:
            start, end = _turn_span(tokenizer, conversation, text, i, found[-1].end if found else 0)
        except InputError:
            if i in trained:
                raise
            continue
        found.append(_Turn(start, end, i in trained))
    return found


def _marked_spans(tokenizer: Tokenizer, conversation: Conversation, text: str, opened: bool) -> Iterator[tuple[int, int]]:
    """What the template wrote inside {% generation %}, and the special token that ends the turn where that comes right after."""
    marked = conversation.text(len(conversation.messages), opened, marked=True)
    pieces = [piece.split(CLOSE) for piece in marked.split(OPEN)]
    if "".join("".join(piece) for piece in pieces) != text or any(len(piece) != 2 for piece in pieces[1:]):
        raise InputError(
            f"chat: {conversation.template.origin} changes what its generation blocks wrote, expected one after the other; "
            "take them out of each other and of filters"
        )
    end, begun = len(pieces[0][0]), None
    for n, (inside, after) in enumerate(pieces[1:], 1):
        begun = end if begun is None else begun
        here, end = end + len(inside), end + len(inside) + len(after)
        if begun == here:
            begun = None
            continue
        inner = list(tokenizer.find_special.finditer(text, begun, here))
        if not inner or text[inner[-1].end() : here].strip():
            if not after and n < len(pieces) - 1:
                continue  # the next block writes on where this one stops
            behind = tokenizer.find_special.match(text, here)
            if behind is None:
                raise InputError(
                    f"chat: {conversation.template.origin} writes no special token at the end of a generation block, expected "
                    "one that ends the turn, or generation never stops; let the template write {{ eos_token }} there"
                )
            here = behind.end()
        yield begun, here
        begun = None


def _turn_span(tokenizer: Tokenizer, conversation: Conversation, text: str, i: int, last: int) -> tuple[int, int]:
    """(start, end) of the assistant's turn i: from the end of its prompt to the end of the last special token of the turn.

    What a turn itself wrote is what all continuations share: another turn, an opened one, and none. Where a template writes a
    turn in another way once it is history (without its reasoning), the token that ends it as the last turn ends it there too.
    """
    later = (n for n, message in enumerate(conversation.messages) if n > i and message.get("role") == "assistant")
    following = next(later, None)
    advice = "correct the template" if following is None else 'correct the template or set train_on = "last"'
    prompt = conversation.text(i, True)
    if len(prompt) < last or not text.startswith(prompt):
        raise InputError(
            f"chat: {conversation.template.origin} doesn't render message {i + 1} (assistant) after its generation prompt, "
            f"expected the prompt to be a prefix of the conversation; {advice}"
        )
    start, opened, closed = len(prompt), conversation.text(i + 1, True), conversation.text(i + 1, False)
    end = _shared_end(tokenizer, text, (opened, closed), start)
    if end is None or tokenizer.find_special.sub("", closed[end:]).strip():
        before = len(text) if following is None else len(conversation.text(following, True))
        end = turn_end_when_last(tokenizer, text[:before], closed, start, end, content_end(conversation, i, closed))
    if end is None:
        raise InputError(
            f"chat: {conversation.template.origin} writes no special token after message {i + 1} (assistant), expected one that "
            f"ends the turn there as it does at the end, or generation never stops ({{{{ eos_token }}}} for one); {advice}"
        )
    return start, end


def _shared_end(tokenizer: Tokenizer, text: str, turns: Sequence[str], start: int) -> int | None:
    """The end of the last special token after start that text and all of turns have in common, with all before it."""
    end = None
    for match in tokenizer.find_special.finditer(text, start):
        if not all(turn.startswith(text[: match.end()]) for turn in turns):
            break
        end = match.end()
    return end


def turn_end_when_last(
    tokenizer: Tokenizer, text: str, closed: str, start: int, shared: int | None, own: int | None
) -> int | None:
    """The end in text of a turn that `closed` ends with, its message's own words up to `own`: where that is before the end that
    is shared, there, else the special token that comes after the words in closed."""
    if own is None or (shared is not None and shared > own):
        return shared if own is not None else None
    ending = tokenizer.find_special.search(closed, max(start, own))
    if ending is None:
        return None
    n = sum(match.group() == ending.group() for match in tokenizer.find_special.finditer(closed, start, ending.end()))
    found = [match.end() for match in tokenizer.find_special.finditer(text, start) if match.group() == ending.group()]
    return found[n - 1] if len(found) >= n else None


def content_end(conversation: Conversation, i: int, closed: str) -> int | None:
    """Where in `closed` the words of its last message end: what comes after them stays when they change. None if they can't."""
    changed = {key: _changed(value) if key != "role" else value for key, value in conversation.messages[i].items()}
    try:
        other = conversation._replace(messages=[*conversation.messages[:i], changed]).text(i + 1, False)
    except InputError:
        return None
    same = 0
    while same < min(len(closed), len(other)) and closed[-1 - same] == other[-1 - same]:
        same = same + 1
    return len(closed) - same


def _changed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _changed(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(child) for child in value]
    return value + CLOSE if isinstance(value, str) else value
