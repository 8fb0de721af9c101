"""Turns of the assistant in a rendered conversation: where each begins and ends, and which are
trained.

A template is a program, so where a turn stands is found by rendering: {% generation %} says it, or
else the conversation is rendered up to the turn, with the turn as its last, and with the turn's
words changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from minitune.errors import InputError
from minitune.text.conversation import Conversation, Turn
from minitune.text.generation_blocks import turns_by_blocks
from minitune.text.sandbox import GENERATION_END
from minitune.text.tokenizer import Tokenizer


def assistant_turns(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
    weights: Mapping[int, float],
    are_required: bool,
) -> list[Turn]:
    """Find the assistant's turns in the text of a conversation; weights: those of `turn_weights`.

    A turn whose borders can't be found is left out, or an InputError if it is trained and they are
    required.
    """
    template = conversation.template
    if conversation.tools and template.tool_use is not None:
        template = template.tool_use
    if template.has_generation_blocks:
        try:
            return turns_by_blocks(tokenizer, conversation, text, add_generation_prompt, weights)
        except InputError:
            if are_required and any(weights.values()):
                raise
            return []
    return _turns_by_rendering(
        tokenizer, conversation, text, add_generation_prompt, weights, are_required
    )


def _turns_by_rendering(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    has_prompt: bool,
    weights: Mapping[int, float],
    are_required: bool,
) -> list[Turn]:
    """Turns of a template without generation blocks, found by rendering up to each.

    has_prompt: text ends with a generation prompt.
    """
    turns: list[Turn] = []
    last = None if has_prompt else len(conversation.messages) - 1
    for i, weight in weights.items():
        end_of_previous = turns[-1].end if turns else 0
        # The text up to the last message is the whole one.
        as_last = text if i == last else None
        try:
            start = _turn_start(conversation, text, i, end_of_previous)
            end = _turn_end(tokenizer, conversation, text, i, start, as_last)
        except InputError:
            if weight and are_required:
                raise
            continue
        turns.append(Turn(start, end, weight))
    return turns


def _turn_start(conversation: Conversation, text: str, i: int, end_of_previous: int) -> int:
    """Start in text of the assistant's turn in message i: where its generation prompt ends."""
    prompt = conversation.text(i, add_generation_prompt=True)
    if len(prompt) < end_of_previous or not text.startswith(prompt):
        found = f"doesn't render message {i + 1} (assistant) after its generation prompt"
        raise InputError(
            f"chat: {conversation.template.origin} {found}, "
            f"expected the prompt to be a prefix of the conversation; {_advice(conversation, i)}"
        )
    return len(prompt)


def _turn_end(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    i: int,
    start: int,
    as_last: str | None,
) -> int:
    """End in text of the assistant's turn in message i, which begins at start.

    That is the last special token that the turn itself writes: one that is there whether another
    turn follows, a prompt, or nothing. Where a template writes a turn differently once it is
    history (without its reasoning), the turn ends there with the same token as it does last.
    as_last: text up to the turn, if that is known.
    """
    if as_last is None:
        as_last = conversation.text(i + 1, add_generation_prompt=False)
    before_prompt = conversation.text(i + 1, add_generation_prompt=True)
    end = _common_special_end(tokenizer, text, (before_prompt, as_last), start)
    is_whole = end is not None and not tokenizer.find_special.sub("", as_last[end:]).strip()
    if appends_prompt(conversation, i + 1, as_last, before_prompt):
        # The special tokens of the prompt that comes after every turn are no part of the turn.
        is_whole, end = False, None
    if not is_whole:
        # The turn's words go on after that token, so it stands inside them, or this turn is written
        # differently here.
        following = _following(conversation, i)
        limit = len(text)
        if following is not None:
            limit = len(conversation.text(following, add_generation_prompt=True))
        words_end = content_end(conversation, i, as_last)
        end = turn_end_when_last(tokenizer, text[:limit], as_last, start, end, words_end)
    if end is None:
        found = f"writes no special token after message {i + 1} (assistant)"
        raise InputError(
            f"chat: {conversation.template.origin} {found}, expected one that ends the turn there "
            "as it does at the end, or generation never stops ({{ eos_token }} for one); "
            f"{_advice(conversation, i)}"
        )
    return end


def _following(conversation: Conversation, i: int) -> int | None:
    """Number of the assistant's next message after i, None if there is none."""
    for n, message in enumerate(conversation.messages[i + 1 :], i + 1):
        if message.get("role") == "assistant":
            return n
    return None


def _advice(conversation: Conversation, i: int) -> str:
    """Words on what to do where the turn in message i can't be found."""
    if _following(conversation, i) is None:
        return 'correct the template or set turns = "each"'
    return 'correct the template or set train_on = "last" or turns = "each"'


def appends_prompt(conversation: Conversation, n: int, text: str, with_prompt: str) -> bool:
    """Return True if the template writes a generation prompt after the first n messages though none
    is asked for.

    Then it writes the same where one is asked for, and goes on differently where a user's message
    follows. text, with_prompt: what it writes of these messages, without and with a prompt.
    """
    if text != with_prompt:
        return False
    longer = conversation._replace(
        messages=[*conversation.messages[:n], {"role": "user", "content": "?"}]
    )
    try:
        return not longer.text(n + 1, add_generation_prompt=False).startswith(text)
    except InputError:
        return False


def _common_special_end(
    tokenizer: Tokenizer, text: str, others: Sequence[str], start: int
) -> int | None:
    """End of the last special token after start up to which text and the others are equal."""
    end = None
    for match in tokenizer.find_special.finditer(text, start):
        if not all(other.startswith(text[: match.end()]) for other in others):
            break
        end = match.end()
    return end


def turn_end_when_last(
    tokenizer: Tokenizer,
    text: str,
    as_last: str,
    start: int,
    common_end: int | None,
    words_end: int | None,
) -> int | None:
    """End in text of a turn, found from how the turn is rendered as the last one.

    as_last: the conversation rendered up to this turn; words_end: where the words of its message
    end in it, if that is known. common_end: end of the last special token that all renderings
    share, if there is one.
    """
    if words_end is None:
        return None
    if common_end is not None and common_end > words_end:
        return common_end  # that token comes after the words: it ends the turn
    ending = tokenizer.find_special.search(as_last, max(start, words_end))
    if ending is None:
        return None
    # The words may hold the same token: the turn ends at the same one of them in text, counted from
    # its start.
    in_last = [
        match.group() for match in tokenizer.find_special.finditer(as_last, start, ending.end())
    ]
    n_same = in_last.count(ending.group())
    ends = [
        match.end()
        for match in tokenizer.find_special.finditer(text, start)
        if match.group() == ending.group()
    ]
    return ends[n_same - 1] if len(ends) >= n_same else None


def content_end(conversation: Conversation, i: int, as_last: str) -> int | None:
    """Place in as_last, the text up to message i, at which the words of that message end.

    What comes after the words stays as it is when the words change; so the message is rendered once
    more with other words, and the two texts are compared from their ends. None if the template
    refuses other words.
    """
    other = _text_with_other_words(conversation, i, at_start=False)
    if other is None:
        return None
    n_equal = 0
    while n_equal < min(len(as_last), len(other)) and as_last[-1 - n_equal] == other[-1 - n_equal]:
        n_equal += 1
    return len(as_last) - n_equal


def content_start(conversation: Conversation, i: int, as_last: str) -> int | None:
    """Place in as_last, the text up to message i, at which the words of that message start, as
    `content_end` finds it."""
    other = _text_with_other_words(conversation, i, at_start=True)
    if other is None:
        return None
    return n_equal_at_start(as_last, other)


def n_equal_at_start(text: str, other: str) -> int:
    """Number of characters at the start of two texts that are the same."""
    n_equal = 0
    while n_equal < min(len(text), len(other)) and text[n_equal] == other[n_equal]:
        n_equal += 1
    return n_equal


def _text_with_other_words(conversation: Conversation, i: int, *, at_start: bool) -> str | None:
    """Text up to message i with another character in its words; None if the template refuses other
    words."""
    message = conversation.messages[i]
    changed = {
        key: value if key == "role" else _other_words(value, at_start)
        for key, value in message.items()
    }
    try:
        return conversation._replace(messages=[*conversation.messages[:i], changed]).text(
            i + 1, False
        )
    except InputError:
        return None


def _other_words(value: Any, at_start: bool) -> Any:
    """Copy a JSON value with another character at one end of all its strings, one that no message
    holds here."""
    if isinstance(value, Mapping):
        return {key: _other_words(child, at_start) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_other_words(child, at_start) for child in value]
    if not isinstance(value, str):
        return value
    return GENERATION_END + value if at_start else value + GENERATION_END
