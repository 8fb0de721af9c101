"""Messages in which nothing reads as a special token.

The texts of messages come from data files. Whatever in them could read as a special token gets a
placeholder, a character of Unicode's last private area. The template renders the placeholder, the
tokenizer finds special tokens in what the template wrote, and only then do the placeholders become
the characters of the message again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from minitune.text.sandbox import GENERATION_END, GENERATION_START
from minitune.text.template import Message, Tool
from minitune.text.tokenizer import Tokenizer, match_starts

FIRST_PLACEHOLDER = 0x100000  # U+100000, where the private area begins


def escape_special_tokens(
    messages: Sequence[Message], tools: Sequence[Tool], tokenizer: Tokenizer
) -> tuple[list[Message], list[Tool], dict[int, str]]:
    """Messages and tools with placeholders for what could read as a special token, and the table
    that restores it.

    The table is one for str.translate; it is empty if nothing had to be replaced.
    """
    placeholders: dict[str, str] = {}
    escaped_messages = [_escape_strings(message, tokenizer, placeholders) for message in messages]
    escaped_tools = [_escape_strings(tool, tokenizer, placeholders) for tool in tools]
    restore = {ord(placeholder): char for char, placeholder in placeholders.items()}
    return escaped_messages, escaped_tools, restore


def _escape_strings(value: Any, tokenizer: Tokenizer, placeholders: dict[str, str]) -> Any:
    """Copy a JSON value with all its strings escaped; placeholders gets the characters that it
    lacks.

    A key stays as it is, because templates read values by it, unless it holds a special token.
    """
    if isinstance(value, Mapping):
        escaped = {}
        for key, child in value.items():
            if tokenizer.find_special.search(key):
                key = _escape_strings(key, tokenizer, placeholders)
            escaped[key] = _escape_strings(child, tokenizer, placeholders)
        return escaped
    if isinstance(value, (list, tuple)):
        return [_escape_strings(child, tokenizer, placeholders) for child in value]
    if isinstance(value, str):
        return _escape_text(value, tokenizer, placeholders)
    return value


def _escape_text(text: str, tokenizer: Tokenizer, placeholders: dict[str, str]) -> str:
    """Copy a text with a placeholder for the first character of everything that could read as a
    special token.
    """
    # Special tokens in any letter case, because a template may change the case.
    places = set(match_starts(tokenizer.special_case_insensitive, text))

    # The beginning of a special token at the end of the text, which the text that comes next might
    # complete. Tokens that begin with a letter or digit are no markup: every second word would be
    # the beginning of one.
    end = len(text.rstrip())
    for i in range(max(0, end - tokenizer.longest_special), end):
        if text[i:end] in tokenizer.markup_beginnings:
            places.add(i)

    # The characters that mark generation blocks.
    if GENERATION_START in text or GENERATION_END in text:
        places |= {i for i, char in enumerate(text) if char in (GENERATION_START, GENERATION_END)}

    if not places:
        return text
    for char in sorted({text[i] for i in places}):
        placeholders.setdefault(char, chr(FIRST_PLACEHOLDER + len(placeholders)))
    return "".join(placeholders[char] if i in places else char for i, char in enumerate(text))
