"""Conversations to tokens: one render function for training, evaluation and generation, and the exact training mask.

Templates come from model folders, so they run in a sandbox with bounded loops. Messages come from data files, so what
they say is never read as a special token.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minitune.template import CLOSE, OPEN, Message, Template, Tool, compile_template, render, told
from minitune.tokenizer import Tokenizer, json_object, starts
from minitune.types import InputError

TrainOn = Literal["assistant", "last", "all"]  # every turn of the assistant, its last one, or every token

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
    shielded, shielded_tools, restore = _shield(messages, tools, tokenizer)
    conversation = _Conversation(template, shielded, shielded_tools)
    text = conversation.text(len(messages), add_generation_prompt)
    if restore:
        plain = render(template, messages, tools=tools, add_generation_prompt=add_generation_prompt)
        if plain != text.translate(restore):
            raise InputError(
                f"chat: {template.origin} reads a special token in the text of a message, expected it to be copied as text; "
                f"remove the special tokens from the content of {told(messages)}"
            )
    # The text is cut where a turn of the assistant starts, as generation cuts it, and where it ends.
    turns = _turns(tokenizer, conversation, text, add_generation_prompt, train_on)
    borders = [0, *(border for turn in turns for border in (turn.start, turn.end)), len(text)]
    ids, mask = [], []
    for n, (start, end) in enumerate(pairwise(borders)):
        stretch = tokenizer.encode_stretch(text[start:end], opens=start == 0, restore=restore)
        ids += stretch
        mask += [train_on == "all" or (n % 2 == 1 and turns[n // 2].trained)] * len(stretch)
    return Tokens(ids, mask)


class _Turn(NamedTuple):
    start: int
    end: int
    trained: bool


class _Conversation(NamedTuple):
    template: Template
    messages: Sequence[Message]
    tools: Sequence[Tool]

    def text(self, n: int, opened: bool, marked: bool = False) -> str:
        """The first n messages; opened: and the opening of the assistant's next turn."""
        return render(self.template, self.messages[:n], tools=self.tools, add_generation_prompt=opened, marked=marked)


def _turns(tokenizer: Tokenizer, conversation: _Conversation, text: str, opened: bool, train_on: TrainOn | None) -> list[_Turn]:
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


def _marked_spans(tokenizer: Tokenizer, conversation: _Conversation, text: str, opened: bool) -> Iterator[tuple[int, int]]:
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


def _turn_span(tokenizer: Tokenizer, conversation: _Conversation, text: str, i: int, last: int) -> tuple[int, int]:
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
        end = _end_as_last(tokenizer, text[:before], closed, start, end, _own_end(conversation, i, closed))
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


def _end_as_last(tokenizer: Tokenizer, text: str, closed: str, start: int, shared: int | None, own: int | None) -> int | None:
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


def _own_end(conversation: _Conversation, i: int, closed: str) -> int | None:
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


def _shield(
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
    places = set(starts(tokenizer.find_lookalike, value))
    end = len(value.rstrip())
    tails = range(max(0, end - max(map(len, tokenizer.special), default=0) + 1), end)
    markup = [token for token in tokenizer.special if not token[0].isalnum()]
    places |= {i for i in tails if any(token.startswith(value[i:end]) for token in markup)}
    places |= {i for i, char in enumerate(value) if char in (OPEN, CLOSE)}
    for char in sorted({value[i] for i in places}):
        stand_ins.setdefault(char, chr(0x100000 + len(stand_ins)))
    return "".join(stand_ins[char] if i in places else char for i, char in enumerate(value)) if places else value
