"""Messages with stand-ins for what could read as a special token."""

from collections.abc import Mapping, Sequence
from typing import Any

from minitune.text.template import CLOSE, OPEN, Message, Tool
from minitune.text.tokenizer import Tokenizer, starts


def escape_special_tokens(
    messages: Sequence[Message], tools: Sequence[Tool], tokenizer: Tokenizer
) -> tuple[list[Message], list[Tool], dict[int, str]]:
    """Messages and tools with stand-ins (U+100000 and up) in what could read as a special token, and the table that restores
    them."""
    stand_ins: dict[str, str] = {}
    shielded = [[_shield_strings(value, tokenizer, stand_ins) for value in values] for values in (messages, tools)]
    return shielded[0], shielded[1], {ord(stand_in): char for char, stand_in in stand_ins.items()}


def _shield_strings(value: Any, tokenizer: Tokenizer, stand_ins: dict[str, str]) -> Any:
    """value with a stand-in for the first character of each special token, in any letter case, and of the beginning of one
    at the end of a string, which the text that comes next might complete; stand_ins gets those that it lacks."""
    if isinstance(value, Mapping):
        names = {key: _shield_strings(key, tokenizer, stand_ins) if tokenizer.find_special.search(key) else key for key in value}
        return {names[key]: _shield_strings(child, tokenizer, stand_ins) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shield_strings(child, tokenizer, stand_ins) for child in value]
    if not isinstance(value, str):
        return value
    places = set(starts(tokenizer.special_case_insensitive, value))
    end = len(value.rstrip())
    tails = range(max(0, end - max(map(len, tokenizer.special), default=0) + 1), end)
    markup = [token for token in tokenizer.special if not token[0].isalnum()]
    places |= {i for i in tails if any(token.startswith(value[i:end]) for token in markup)}
    places |= {i for i, char in enumerate(value) if char in (OPEN, CLOSE)}
    for char in sorted({value[i] for i in places}):
        stand_ins.setdefault(char, chr(0x100000 + len(stand_ins)))
    return "".join(stand_ins[char] if i in places else char for i, char in enumerate(value)) if places else value
