"""Conversations of rows: messages and tools, from the formats that data comes in."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from minitune.data.source import Source, column
from minitune.errors import InputError
from minitune.text.template import Message, Tool

SYSTEM_ROLES = ("system", "developer")
# Roles of data sets by other names, in any letter case.
ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}


def messages(
    row: Mapping[str, Any],
    source: Source,
    where: str,
    *,
    is_open: bool = False,
) -> list[Message]:
    """Messages of a row of format instruct or chat.

    A chat is OpenAI's messages, ShareGPT's conversations, or TRL's prompt and completion. A system
    prompt and earlier turns come from the columns system and history. is_open: the answer may be
    missing.
    InputError for a missing column or a value of another type; where = "file:line".
    """
    if source.format == "instruct":
        turns = _instruction(row, source, where, is_open)
    else:
        turns = _chat(row, source, where, is_open)
    return opening(row, source, where, turns)


def opening(
    row: Mapping[str, Any],
    source: Source,
    where: str,
    turns: Sequence[Message],
) -> list[Message]:
    """Messages with those of the columns system and history before them.

    The system message is in the user's first one where the source asks for that.
    """
    earlier: list[Message] = []
    key = _key("history", source)
    for n, turn in enumerate(_optional(row, "history", list, source, where) or [], 1):
        is_pair = isinstance(turn, list) and len(turn) == 2
        if not (is_pair and all(isinstance(text, str) for text in turn)):
            found = f'data: {where} "{key}" entry {n} is no pair of strings'
            raise InputError(f"{found}, expected a question and its answer; correct the line")
        earlier.append({"role": "user", "content": turn[0]})
        earlier.append({"role": "assistant", "content": turn[1]})
    system = _system(row, source, where)
    first = list(turns[:1]) if turns and turns[0]["role"] in SYSTEM_ROLES else []
    if system and first and first[0].get("content") != system:
        raise InputError(
            f"data: {where} has a system prompt in a column of its own and another in its "
            "messages, expected one; correct the line"
        )
    rest = turns[len(first) :]
    if system and not first:
        first = [{"role": "system", "content": system}]
    whole = [*first, *earlier, *rest]
    return _system_in_user(whole) if source.system_in_user else whole


def _system(row: Mapping[str, Any], source: Source, where: str) -> str | None:
    """System prompt in a column of its own, under the source's name for it or a usual one."""
    system = _optional(row, "system", str, source, where)
    if system is None and "system" not in source.columns:
        system = _optional(row, "system_prompt", str, source, where)
    return system


def _system_in_user(turns: Sequence[Message]) -> list[Message]:
    """Messages with a leading system message put at the start of the user's first one."""
    roles = [turn["role"] for turn in turns[:2]]
    if len(roles) < 2 or roles[0] not in SYSTEM_ROLES or roles[1] != "user":
        return list(turns)
    system, user = turns[0].get("content"), turns[1].get("content")
    if not (isinstance(system, str) and isinstance(user, str)):
        return list(turns)
    return [{**turns[1], "content": f"{system}\n\n{user}"}, *turns[2:]]


def _instruction(
    row: Mapping[str, Any],
    source: Source,
    where: str,
    is_open: bool,
) -> list[Message]:
    """Messages of a row with an instruction, perhaps an input, and an output."""
    instruction = column(row, "instruction", (str,), source, where)
    context = _optional(row, "input", str, source, where)
    # Either may be empty: then the other is the whole question.
    question = "\n".join(text for text in (instruction, context) if text)
    turns: list[Message] = [{"role": "user", "content": question}]
    if is_open and _key("output", source) not in row:
        return turns
    output = column(row, "output", (str,), source, where)
    return [*turns, {"role": "assistant", "content": output}]


def _chat(row: Mapping[str, Any], source: Source, where: str, is_open: bool) -> list[Message]:
    """Messages of a row of format chat, under any of the names that data sets have for them."""
    named = {**row, **source.columns}
    name = "messages"
    if "messages" not in named and "conversations" in row:
        name = "conversations"
    elif "messages" not in named and "prompt" in row:
        asked = _turns(row["prompt"], "user", where)
        if is_open and "completion" not in row:
            return asked
        answer = column(row, "completion", (str, list), source, where)
        return [*asked, *_turns(answer, "assistant", where)]
    return conversation(column(row, name, (list, str), source, where), where)


def _turns(value: Any, role: str, where: str) -> list[Message]:
    """Messages of a value that is one message's text, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return conversation(value, where)


def _key(name: str, source: Source) -> str:
    """Name of a column in the source's file."""
    return source.columns.get(name, name)


def _optional(row: Mapping[str, Any], name: str, kind: type, source: Source, where: str) -> Any:
    """Value of a column that may be missing or null, then None."""
    if row.get(_key(name, source)) is None:
        return None
    return column(row, name, (kind,), source, where)


def tools(row: Mapping[str, Any], source: Source, where: str) -> list[Tool]:
    """Functions that the assistant may call in a row, as JSON schemas; the column is a list of
    objects or its JSON text.
    """
    name = source.columns.get("tools", "tools")
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value) if value.strip() else None
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(
                f'data: {where} "{name}" is no JSON ({error}), expected a list of objects; '
                "correct the line"
            ) from None
    if not isinstance(value, list | None) or not all(
        isinstance(tool, dict) for tool in value or []
    ):
        raise InputError(
            f'data: {where} "{name}" is a {type(value).__name__}, expected a list of objects; '
            "correct the line"
        )
    return value or []


def conversation(turns: Any, where: str) -> list[Message]:
    """Messages in OpenAI's form, of a list in that form or in ShareGPT's, or of its JSON text.

    InputError for an empty list, and for anything else.
    """
    turns = _decoded(turns)
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list):
        kind = type(turns).__name__
        raise InputError(
            f"data: {where} holds a {kind}, expected a list of messages; correct the line"
        )
    if not turns:
        raise InputError(
            f"data: {where} holds a conversation of no messages, expected at least one; remove "
            "the line"
        )
    return [_turn(turn, f"{where} message {n}") for n, turn in enumerate(turns, 1)]


def split_answer(turns: Sequence[Message], where: str) -> tuple[list[Message], Message]:
    """Split a conversation into (prompt, answer); InputError if the last message is not the
    assistant's.
    """
    *asked, answer = turns
    if answer["role"] != "assistant":
        raise InputError(
            f"data: {where} ends with a message of {answer['role']!r}, expected an answer of "
            "'assistant'; correct it"
        )
    return asked, answer


def _turn(turn: Any, where: str) -> Message:
    """Message in OpenAI's form; other keys than its role and content stay."""
    if isinstance(turn, dict) and "from" in turn:
        turn = _from_sharegpt(turn, where)
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
        raise InputError(
            f'data: {where} has no "role", expected an object with "role" and "content"; correct it'
        )
    role = ROLES.get(turn["role"].lower())
    if role not in (None, turn["role"]):
        turn = {**turn, "role": role}
    content = turn.get("content")
    if not isinstance(content, (str, list, type(None))):
        raise InputError(
            f'data: {where} has a "content" of type {type(content).__name__}, expected a string; '
            "correct it"
        )
    call = turn.get("function_call")
    if isinstance(call, dict) and "tool_calls" not in turn:  # OpenAI's first name for one call
        turn = {key: value for key, value in turn.items() if key != "function_call"}
        turn["tool_calls"] = [{"type": "function", "function": call}]
    return turn


def _from_sharegpt(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Message in OpenAI's form of one in ShareGPT's, whose "from" is the role."""
    names = {"from": "role", "value": "content"}
    turn = {names.get(key, key): value for key, value in turn.items()}
    if turn["role"] != "function_call":
        return turn
    # A thought may stand before the call, and the calls may be a list.
    thought, end, written = str(turn.get("content")).rpartition("</think>")
    calls = _decoded(written)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise InputError(
            f'data: {where} has a function_call that is no JSON object, expected "name" and '
            '"arguments"'
        )
    made = [{"type": "function", "function": call} for call in calls]
    return {**turn, "role": "assistant", "content": thought + end, "tool_calls": made}


def _decoded(text: Any) -> Any:
    """Value of a JSON text; anything else as it is."""
    try:
        return msgspec.json.decode(text) if isinstance(text, str) else text
    except (msgspec.DecodeError, RecursionError):
        return text
