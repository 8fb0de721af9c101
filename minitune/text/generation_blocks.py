"""Turns of the assistant that a template declares with {% generation %} blocks."""

from collections.abc import Iterator, Mapping

from minitune.errors import InputError
from minitune.text.conversation import Conversation, Turn
from minitune.text.sandbox import GENERATION_END, GENERATION_START
from minitune.text.tokenizer import Tokenizer


def turns_by_blocks(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    add_generation_prompt: bool,
    weights: Mapping[int, float],
) -> list[Turn]:
    """Turns that {% generation %} blocks declare."""
    spans = list(_generation_spans(tokenizer, conversation, text, add_generation_prompt))
    weight_of = _weights_of_blocks(tokenizer, conversation, len(spans), weights)
    return [Turn(start, end, weight) for (start, end), weight in zip(spans, weight_of, strict=True)]


def _weights_of_blocks(
    tokenizer: Tokenizer, conversation: Conversation, n_blocks: int, weights: Mapping[int, float]
) -> list[float]:
    """Weight of each generation block: that of the assistant's message which it stands in."""
    if len(set(weights.values())) == 1:
        return n_blocks * [next(iter(weights.values()))]
    weight_of = n_blocks * [0.0]
    for i, weight in weights.items():
        # A message's blocks, and those of what answers its calls, begin after the blocks of the
        # messages before it.
        before = conversation._replace(messages=conversation.messages[:i])
        text = before.text(i, add_generation_prompt=False)
        n_before = len(list(_generation_spans(tokenizer, before, text, False)))
        weight_of[n_before:] = (n_blocks - n_before) * [weight]
    return weight_of


def _generation_spans(
    tokenizer: Tokenizer, conversation: Conversation, text: str, add_generation_prompt: bool
) -> Iterator[tuple[int, int]]:
    """(start, end) of what the template wrote inside {% generation %}, with the special token that
    ends the turn.

    Blocks that follow each other at once are one turn, up to the block that ends with a special
    token. A special token right after a block belongs to it.
    """
    n_messages = len(conversation.messages)
    marked = conversation.text(n_messages, add_generation_prompt, mark_generation=True)
    pieces = [piece.split(GENERATION_END) for piece in marked.split(GENERATION_START)]
    unmarked = "".join("".join(piece) for piece in pieces)
    if unmarked != text or any(len(piece) != 2 for piece in pieces[1:]):
        raise InputError(
            f"chat: {conversation.template.origin} changes what its generation blocks wrote, "
            "expected one after the other; take them out of each other and of filters"
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


def _special_token_end(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    place: int,
) -> int:
    """End of the special token that begins at a place; InputError if there is none."""
    token = tokenizer.find_special.match(text, place)
    if token is None:
        raise InputError(
            f"chat: {conversation.template.origin} writes no special token at the end of a "
            "generation block, expected one that ends the turn, or generation never stops; "
            "let the template write {{ eos_token }} there"
        )
    return token.end()
