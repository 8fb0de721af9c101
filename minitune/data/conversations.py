"""Conversations of a row: messages and tools, in the formats that data comes in."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from minitune.data.source import Source, column
from minitune.errors import InputError
from minitune.text.template import Message, Tool

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}


def messages(row: Mapping[str, Any], source: Source, where: str) -> list[Message]:
    """The conversation in a row of format instruct or chat (OpenAI's messages, ShareGPT's conversations); where = "file:line".

    InputError for a missing column or a value of another type.
    """
    if source.format == "instruct":
        instruction, output = column(row, "instruction", (str,), source, where), column(row, "output", (str,), source, where)
        given = row.get(source.columns.get("input", "input")) is not None
        context = column(row, "input", (str,), source, where) if given else ""
        asked = f"{instruction}\n{context}" if context else instruction
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    sharegpt = "conversations" in row and "messages" not in {**row, **source.columns}
    name = "conversations" if sharegpt else "messages"
    return conversation(column(row, name, (list,), source, where), where)


def tools(row: Mapping[str, Any], source: Source, where: str) -> list[Tool]:
    """The functions that the assistant may call in a row, as JSON schemas: a list of objects, or that as a string of JSON."""
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
    """Messages in OpenAI's form: ShareGPT's from and value become role and content; InputError for no message."""
    if not turns:
        raise InputError(f"data: {where} holds a conversation of no messages, expected at least one; remove the line")
    return [_turn(turn, f"{where} message {n}") for n, turn in enumerate(turns, 1)]


def answered(turns: Sequence[Message], where: str) -> tuple[list[Message], Message]:
    """(what was asked, the answer to it); InputError if the last message is not the assistant's."""
    *asked, answer = turns
    if answer["role"] != "assistant":
        raise InputError(
            f"data: {where} ends with a message of {answer['role']!r}, expected an answer of 'assistant'; correct it"
        )
    return asked, answer


def _turn(turn: Any, where: str) -> Message:
    """A message in OpenAI's form; ShareGPT's from and value become role and content, other keys stay."""
    if isinstance(turn, dict) and "from" in turn:
        turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
        turn = {**turn, "role": SHAREGPT_ROLES.get(str(turn["role"]), turn["role"])}
        if turn["role"] == "function_call":
            call = _decoded(turn.get("content"))
            if not isinstance(call, dict):
                raise InputError(f'data: {where} has a function_call that is no JSON object, expected "name" and "arguments"')
            turn = {**turn, "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)):
        raise InputError(f'data: {where} has no "role", expected an object with "role" and "content"; correct it')
    if not isinstance(turn.get("content"), (str, list, type(None))):
        found = type(turn["content"]).__name__
        raise InputError(f'data: {where} has a "content" of type {found}, expected a string; correct it')
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": [_call(call) for call in calls]} if isinstance(calls, list) else turn


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, as servers hand them to templates, and not as OpenAI's string of JSON."""
    if not isinstance(call, dict) or not isinstance(inner := call.get("function", call), dict):
        return call
    arguments = _decoded(inner.get("arguments"))
    if not isinstance(arguments, dict):
        return call
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _decoded(text: Any) -> Any:
    """What a string of JSON says; anything else as it is."""
    try:
        return msgspec.json.decode(text) if isinstance(text, str) else text
    except (msgspec.DecodeError, RecursionError):
        return text
