"""Prompts of a source, for generation."""

from typing import NamedTuple

from minitune.data.conversations import answered, messages, tools
from minitune.data.readers import error_location, rows_with_location
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.text.chat import encode_prompt
from minitune.text.template import Message, Template, with_options
from minitune.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """What to ask, as token ids and as messages, and the answer that the data gives."""

    ids: list[int]
    reference: str
    messages: list[Message]


def prompts(source: Source, tokenizer: Tokenizer, template: Template) -> list[Prompt]:
    """What to generate from: each conversation without its last message, which must be the assistant's, the reference."""
    for part in source.parts():
        if part.format not in ("instruct", "chat"):
            asks = "plain text asks for no answer" if part.format == "text" else "a pair has no one answer"
            raise InputError(f"data: {part.path} has format {part.format!r}, expected instruct or chat; {asks}")
    found = []
    for part in source.parts():
        told = with_options(template, part.chat_template_kwargs, part.path)
        for where, row in rows_with_location(part):
            asked, answer = answered(messages(row, part, where), where)
            if not isinstance(answer.get("content"), str):
                raise InputError(f"data: {where} has an answer without text, expected a string to compare with; correct it")
            with error_location(where):
                ids = encode_prompt(tokenizer, told, asked, tools=tools(row, part, where))
            found.append(Prompt(ids, answer["content"], asked))
    return found
