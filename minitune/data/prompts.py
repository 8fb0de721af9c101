"""Prompts of a source, for generation."""

from typing import NamedTuple

from minitune.data.conversations import messages, tools
from minitune.data.readers import error_location, rows_with_location
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.text.chat import encode_prompt
from minitune.text.served import answer_text
from minitune.text.template import Message, Template, with_options
from minitune.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Token ids and messages to generate from, and the answer that the data gives.

    reference: the words of the answer's message. target: the text that a model writes which learned
    the answer, to be compared with what it generates; a template may write more than the words.
    Both are None without an answer.
    """

    ids: list[int]
    reference: str | None
    messages: list[Message]
    target: str | None


def prompts(source: Source, tokenizer: Tokenizer, template: Template) -> list[Prompt]:
    """Prompts of a source: each conversation without its last message, if that is the assistant's:
    the reference.

    InputError for a format without such answers, and for a malformed row.
    """
    for part in source.parts():
        if part.format not in ("instruct", "chat"):
            why = "plain text asks for no answer" if part.format == "text" else "a pair has no one answer"
            raise InputError(f"data: {part.path} has format {part.format!r}, expected instruct or chat; {why}")
    collected: list[Prompt] = []
    for part in source.parts():
        part_template = with_options(template, part.chat_template_kwargs, part.path)
        for where, row in rows_with_location(part):
            asked = messages(row, part, where, is_open=True)
            functions = tools(row, part, where)
            reference = target = None
            with error_location(where):
                if asked[-1]["role"] == "assistant":
                    content = asked[-1].get("content")
                    reference = content if isinstance(content, str) else ""
                    target = answer_text(tokenizer, part_template, asked, tools=functions)
                    asked = asked[:-1]
                ids = encode_prompt(tokenizer, part_template, asked, tools=functions)
            collected.append(Prompt(ids, reference, asked, target))
    return collected
