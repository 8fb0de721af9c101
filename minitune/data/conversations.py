"""Conversations of rows: messages and tools, from the formats that data comes in."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from minitune.data.source import Source, column
from minitune.errors import InputError
from minitune.text.template import Message, Tool

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}


def messages(row: Mapping[str, Any], source: Source, where: str) -> list[Message]:
    """Messages of a row of format instruct or chat (OpenAI's messages, ShareGPT's conversations).

    InputError for a missing column or a value of another type; where = "file:line".
    """
    if source.format == "instruct":
        instruction = column(row, "instruction", (str,), source, where)
        output = column(row, "output", (str,), source, where)
        # The input may be missing, null or empty: then the instruction is the whole question.
        has_input = row.get(source.columns.get("input", "input")) is not None
        context = column(row, "input", (str,), source, where) if has_input else ""
        question = f"{instruction}\n{context}" if context else instruction
        return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    is_sharegpt = "conversations" in row and "messages" not in {**row, **source.columns}
    name = "conversations" if is_sharegpt else "messages"
    return conversation(column(row, name, (list,), source, where), where)


def tools(row: Mapping[str, Any], source: Source, where: str) -> list[Tool]:
    """Functions that the assistant may call in a row, as JSON schemas; the column is a list of objects or its JSON text."""
    name = source.columns.get("tools", "tools")
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value) if value.strip() else None
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(
                f'data: {where} "{name}" is no JSON ({error}), expected a list of objects; correct the line'
            ) from None
    if not isinstance(value, list | None) or not all(isinstance(tool, dict) for tool in value or []):
        raise InputError(f'data: {where} "{name}" is a {type(value).__name__}, expected a list of objects; correct the line')
    return value or []


def conversation(turns: Sequence[Any], where: str) -> list[Message]:
    """Messages in OpenAI's form, of a list in that form or in ShareGPT's; InputError for an empty one."""
    if not turns:
        raise InputError(f"data: {where} holds a conversation of no messages, expected at least one; remove the line")
    return [_turn(turn, f"{where} message {n}") for n, turn in enumerate(turns, 1)]


def split_answer(turns: Sequence[Message], where: str) -> tuple[list[Message], Message]:
    """Split a conversation into (prompt, answer); InputError if the last message is not the assistant's."""
    *asked, answer = turns
    if answer["role"] != "assistant":
        raise InputError(
            f"data: {where} ends with a message of {answer['role']!r}, expected an answer of 'assistant'; correct it"
        )
    return asked, answer


def _turn(turn: Any, where: str) -> Message:
    """Message in OpenAI's form; other keys than its role and content stay."""
    if isinstance(turn, dict) and "from" in turn:
        turn = _from_sharegpt(turn, where)
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
        raise InputError(f'data: {where} has no "role", expected an object with "role" and "content"; correct it')
    content = turn.get("content")
    if not isinstance(content, (str, list, type(None))):
        raise InputError(f'data: {where} has a "content" of type {type(content).__name__}, expected a string; correct it')
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": [_call(call) for call in calls]} if isinstance(calls, list) else turn


def _from_sharegpt(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Message in OpenAI's form of one in ShareGPT's, whose from and value become role and content."""
    names = {"from": "role", "value": "content"}
    turn = {names.get(key, key): value for key, value in turn.items()}
    turn["role"] = SHAREGPT_ROLES.get(str(turn["role"]), turn["role"])
    if turn["role"] != "function_call":
        return turn
    call = _decoded(turn.get("content"))
    if not isinstance(call, dict):
        raise InputError(f'data: {where} has a function_call that is no JSON object, expected "name" and "arguments"')
    return {**turn, "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}


def _call(call: Any) -> Any:
    """Tool call with its arguments as an object, as servers give them to templates, in place of OpenAI's JSON text."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        return call
    arguments = _decoded(inner.get("arguments"))
    if not isinstance(arguments, dict):
        return call
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _decoded(text: Any) -> Any:
    """Value of a JSON text; anything else as it is."""
    try:
        return msgspec.json.decode(text) if isinstance(text, str) else text
    except (msgspec.DecodeError, RecursionError):
        return text
