"""Turns of the assistant in a rendered conversation: where each begins and ends, and which are trained.

A template is a program, so where a turn stands is found by rendering: {% generation %} says it, or else the
conversation is rendered up to the turn, with the turn as its last, and with the turn's words changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from minitune.errors import InputError
from minitune.text.template import GENERATION_END, GENERATION_START, Message, Template, Tool, render
from minitune.text.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "all"]  # every turn of the assistant, its last one, or every token


class Turn(NamedTuple):
    """Characters start to end of a rendered conversation, an assistant's turn with its end-of-turn token."""

    start: int
    end: int
    trained: bool


class Conversation(NamedTuple):
    """Messages with the template that renders them."""

    template: Template
    messages: Sequence[Message]
    tools: Sequence[Tool]

    def text(self, n: int, add_generation_prompt: bool, mark_generation: bool = False) -> str:
        """Render the first n messages; the arguments are those of `render`."""
        return render(
            self.template,
            self.messages[:n],
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
            mark_generation=mark_generation,
        )


def assistant_turns(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
    train_on: TrainOn | None,
) -> list[Turn]:
    """Find the assistant's turns in the text of a conversation.

    InputError for a trained turn whose borders can't be found; another one of that kind is left out.
    """
    template = conversation.template
    if conversation.tools and template.tool_use is not None:
        template = template.tool_use
    if template.has_generation_blocks:
        return _turns_by_blocks(tokenizer, conversation, text, add_generation_prompt, train_on)
    return _turns_by_rendering(tokenizer, conversation, text, train_on)


def _turns_by_blocks(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
    train_on: TrainOn | None,
) -> list[Turn]:
    """Turns that {% generation %} blocks declare."""
    first_trained = 0
    try:
        spans = list(_generation_spans(tokenizer, conversation, text, add_generation_prompt))
        if train_on == "last":
            first_trained = _n_spans_before_last(tokenizer, conversation)
    except InputError:
        if train_on in ("assistant", "last"):
            raise
        return []
    return [Turn(start, end, train_on is not None and n >= first_trained) for n, (start, end) in enumerate(spans)]


def _n_spans_before_last(tokenizer: Tokenizer, conversation: Conversation) -> int:
    """Number of generation blocks that stand before the assistant's last message."""
    messages = conversation.messages
    assistants = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    before = conversation._replace(messages=messages[: assistants[-1]]) if assistants else conversation
    text = before.text(len(before.messages), add_generation_prompt=False)
    return len(list(_generation_spans(tokenizer, before, text, add_generation_prompt=False)))


def _generation_spans(
    tokenizer: Tokenizer, conversation: Conversation, text: str, add_generation_prompt: bool
) -> Iterator[tuple[int, int]]:
    """(start, end) of what the template wrote inside {% generation %}, with the special token that ends the turn.

    Blocks that follow each other at once are one turn, up to the block that ends with a special token. A special
    token right after a block belongs to it.
    """
    marked = conversation.text(len(conversation.messages), add_generation_prompt, mark_generation=True)
    pieces = [piece.split(GENERATION_END) for piece in marked.split(GENERATION_START)]
    unmarked = "".join("".join(piece) for piece in pieces)
    if unmarked != text or any(len(piece) != 2 for piece in pieces[1:]):
        raise InputError(
            f"chat: {conversation.template.origin} changes what its generation blocks wrote, expected one after the other; "
            "take them out of each other and of filters"
        )
    start: int | None = None  # of the turn that is open
    next_start = len(pieces[0][0])
    for n, (inside, after) in enumerate(pieces[1:], 1):
        if start is None:
            start = next_start
        end = next_start + len(inside)
        next_start = end + len(after)
        if start == end:  # an empty block
            start = None
            continue
        if not _ends_with_special(tokenizer, text, start, end):
            if not after and n < len(pieces) - 1:
                continue  # the next block goes on where this one stops
            end = _special_token_end(tokenizer, conversation, text, end)
        yield start, end
        start = None


def _ends_with_special(tokenizer: Tokenizer, text: str, start: int, end: int) -> bool:
    """True if the last thing in text[start:end], but for whitespace, is a special token."""
    tokens = list(tokenizer.find_special.finditer(text, start, end))
    return bool(tokens) and not text[tokens[-1].end() : end].strip()


def _special_token_end(tokenizer: Tokenizer, conversation: Conversation, text: str, place: int) -> int:
    """End of the special token that begins at a place; InputError if there is none."""
    token = tokenizer.find_special.match(text, place)
    if token is None:
        raise InputError(
            f"chat: {conversation.template.origin} writes no special token at the end of a generation block, expected "
            "one that ends the turn, or generation never stops; let the template write {{ eos_token }} there"
        )
    return token.end()


def _turns_by_rendering(tokenizer: Tokenizer, conversation: Conversation, text: str, train_on: TrainOn | None) -> list[Turn]:
    """Turns of a template without generation blocks, found by rendering the conversation up to each."""
    assistants = [i for i, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
    trained: Sequence[int] = ()
    if train_on == "assistant":
        trained = assistants
    elif train_on == "last":
        trained = assistants[-1:]
    turns: list[Turn] = []
    for i in assistants:
        end_of_previous = turns[-1].end if turns else 0
        try:
            start, end = _turn_span(tokenizer, conversation, text, i, end_of_previous)
        except InputError:
            if i in trained:
                raise
            continue
        turns.append(Turn(start, end, i in trained))
    return turns


def _turn_span(tokenizer: Tokenizer, conversation: Conversation, text: str, i: int, end_of_previous: int) -> tuple[int, int]:
    """(start, end) in text of the assistant's turn in message i.

    It starts where the generation prompt for it ends. It ends with the last special token that the turn itself
    writes: one that is there whether another turn follows, a prompt, or nothing. Where a template writes a turn
    differently once it is history (without its reasoning), the turn ends there with the same token as it does last.
    """
    following = next((n for n, message in enumerate(conversation.messages) if n > i and message.get("role") == "assistant"), None)
    advice = "correct the template" if following is None else 'correct the template or set train_on = "last"'
    prompt = conversation.text(i, add_generation_prompt=True)
    if len(prompt) < end_of_previous or not text.startswith(prompt):
        raise InputError(
            f"chat: {conversation.template.origin} doesn't render message {i + 1} (assistant) after its generation prompt, "
            f"expected the prompt to be a prefix of the conversation; {advice}"
        )
    start = len(prompt)
    before_prompt = conversation.text(i + 1, add_generation_prompt=True)
    as_last = conversation.text(i + 1, add_generation_prompt=False)
    end = _common_special_end(tokenizer, text, (before_prompt, as_last), start)
    is_whole = end is not None and not tokenizer.find_special.sub("", as_last[end:]).strip()
    if not is_whole:
        # The turn's words go on after that token, so it stands inside them, or this turn is written differently here.
        limit = len(text) if following is None else len(conversation.text(following, add_generation_prompt=True))
        words_end = content_end(conversation, i, as_last)
        end = turn_end_when_last(tokenizer, text[:limit], as_last, start, end, words_end)
    if end is None:
        raise InputError(
            f"chat: {conversation.template.origin} writes no special token after message {i + 1} (assistant), expected one that "
            f"ends the turn there as it does at the end, or generation never stops ({{{{ eos_token }}}} for one); {advice}"
        )
    return start, end


def _common_special_end(tokenizer: Tokenizer, text: str, others: Sequence[str], start: int) -> int | None:
    """End of the last special token after start up to which text and the others are equal."""
    end = None
    for match in tokenizer.find_special.finditer(text, start):
        if not all(other.startswith(text[: match.end()]) for other in others):
            break
        end = match.end()
    return end


def turn_end_when_last(
    tokenizer: Tokenizer, text: str, as_last: str, start: int, common_end: int | None, words_end: int | None
) -> int | None:
    """End in text of a turn, found from how the turn is rendered as the last one.

    as_last: the conversation rendered up to this turn; words_end: where the words of its message end in it, if that
    is known. common_end: end of the last special token that all renderings share, if there is one.
    """
    if words_end is None:
        return None
    if common_end is not None and common_end > words_end:
        return common_end  # that token comes after the words: it ends the turn
    ending = tokenizer.find_special.search(as_last, max(start, words_end))
    if ending is None:
        return None
    # The words may hold the same token: the turn ends at the same one of them in text, counted from its start.
    in_last = [match.group() for match in tokenizer.find_special.finditer(as_last, start, ending.end())]
    n_same = in_last.count(ending.group())
    ends = [match.end() for match in tokenizer.find_special.finditer(text, start) if match.group() == ending.group()]
    return ends[n_same - 1] if len(ends) >= n_same else None


def content_end(conversation: Conversation, i: int, as_last: str) -> int | None:
    """Place in as_last, the text up to message i, at which the words of that message end.

    What comes after the words stays as it is when the words change; so the message is rendered once more with other
    words, and the two texts are compared from their ends. None if the template refuses other words.
    """
    message = conversation.messages[i]
    changed = {key: value if key == "role" else _with_other_words(value) for key, value in message.items()}
    try:
        other = conversation._replace(messages=[*conversation.messages[:i], changed]).text(i + 1, False)
    except InputError:
        return None
    n_equal = 0
    while n_equal < min(len(as_last), len(other)) and as_last[-1 - n_equal] == other[-1 - n_equal]:
        n_equal += 1
    return len(as_last) - n_equal


def _with_other_words(value: Any) -> Any:
    """Copy a JSON value with another character at the end of all its strings, one that no message holds here."""
    if isinstance(value, Mapping):
        return {key: _with_other_words(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_other_words(child) for child in value]
    return value + GENERATION_END if isinstance(value, str) else value
