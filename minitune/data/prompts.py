"""Prompts of a source, for generation."""

from typing import NamedTuple

from minitune.data.conversations import messages, split_answer, tools
from minitune.data.readers import error_location, rows_with_location
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.text.chat import encode_prompt
from minitune.text.template import Message, Template, with_options
from minitune.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Token ids and messages to generate from, and the answer that the data gives."""

    ids: list[int]
    reference: str
    messages: list[Message]


def prompts(source: Source, tokenizer: Tokenizer, template: Template) -> list[Prompt]:
    """Prompts of a source: each conversation without its last message, the assistant's, which is the reference.

    InputError for a format without such answers, for a malformed row and for an answer without text.
    """
    for part in source.parts():
        if part.format not in ("instruct", "chat"):
            why = "plain text asks for no answer" if part.format == "text" else "a pair has no one answer"
            raise InputError(f"data: {part.path} has format {part.format!r}, expected instruct or chat; {why}")
    collected: list[Prompt] = []
    for part in source.parts():
        part_template = with_options(template, part.chat_template_kwargs, part.path)
        for where, row in rows_with_location(part):
            asked, answer = split_answer(messages(row, part, where), where)
            if not isinstance(answer.get("content"), str):
                raise InputError(f"data: {where} has an answer without text, expected a string to compare with; correct it")
            with error_location(where):
                ids = encode_prompt(tokenizer, part_template, asked, tools=tools(row, part, where))
            collected.append(Prompt(ids, answer["content"], asked))
    return collected
