"""Prompts of a source, for generation, and the answers that its rows give to them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minitune.data.conversations import messages, tools
from minitune.data.encoded_rows import Refused, encoded_rows
from minitune.data.readers import error_location
from minitune.data.row_weights import row_weight
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.text.chat import Tokens, encode_chat, encode_prompt
from minitune.text.served import encode_answer, stop_ids
from minitune.text.template import Message, Template, Tool, with_options
from minitune.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Token ids and messages to generate from, and the answer that the row gives.

    reference_ids: the answer as the template writes it after the prompt, up to the token that ends
    it, which is what training teaches; reference: its text without special tokens. Both are empty
    where the row has no answer.
    """

    ids: list[int]
    reference: str
    reference_ids: list[int]
    messages: list[Message]


def prompts(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    limit: int | None = None,
    refused: list[Refused] | None = None,
) -> list[Prompt]:
    """First `limit` prompts of a source: each conversation without its last answer, the reference.

    A conversation that ends with another message than the assistant's, or a row of instructions
    without its output, is a prompt as a whole and has no reference. refused gets the rows that
    invalid = "skip" leaves out.

    InputError for a format without prompts, for a malformed row and for an answer that the
    template can't write.
    """
    return _collect(source, tokenizer, template, limit, refused, with_references=True)


def questions(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    limit: int | None = None,
    refused: list[Refused] | None = None,
) -> list[Prompt]:
    """Prompts as of `prompts`, but with no reference: the rows' own answers are not looked at."""
    return _collect(source, tokenizer, template, limit, refused, with_references=False)


def _collect(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    limit: int | None,
    refused: list[Refused] | None,
    *,
    with_references: bool,
) -> list[Prompt]:
    for part in source.parts():
        if part.format not in ("instruct", "chat"):
            is_text = part.format == "text"
            why = "plain text asks for no answer" if is_text else "a pair has no one answer"
            found = f"data: {part.path_names} has format {part.format!r}"
            raise InputError(f"{found}, expected instruct or chat; {why}")
    collected: list[Prompt] = []
    for part in source.parts():
        part_template = with_options(template, part.chat_template_kwargs, part.path_names)
        encode = _encoder(part, tokenizer, part_template, with_references)
        for _, prompt in encoded_rows(part, encode, [] if refused is None else refused):
            collected.append(prompt)
            if len(collected) == limit:
                return collected
    return collected


def _encoder(
    part: Source,
    tokenizer: Tokenizer,
    template: Template,
    with_references: bool,
) -> Callable[[Mapping[str, Any], str], Prompt]:
    """Function of (row, "file:line") that returns the row's prompt."""
    stops = stop_ids(tokenizer, template) if with_references else []

    def encode(row: Mapping[str, Any], where: str) -> Prompt:
        asked, answer = _split_row(row, part, where)
        functions = tools(row, part, where)
        with error_location(where):
            ids = encode_prompt(tokenizer, template, asked, tools=functions)
            reference_ids: list[int] = []
            # As a turn of weight 0, a row of weight 0 has no answer to compare with.
            if with_references and answer is not None and row_weight(row, part, where) > 0:
                turns = [*asked, answer]
                tokens = _encode(part, tokenizer, template, turns, functions)
                reference_ids = _answer_ids(tokens, stops)
        text = tokenizer.decode(reference_ids, skip_special=True)
        return Prompt(ids, text, reference_ids, asked)

    return encode


def _split_row(
    row: Mapping[str, Any],
    part: Source,
    where: str,
) -> tuple[list[Message], Message | None]:
    """(messages of the prompt, answer or None) of a row."""
    turns = messages(row, part, where, is_open=True)
    asked, answer = turns, None
    if turns[-1]["role"] == "assistant":
        *asked, answer = turns
    if answer is not None and not (answer.get("content") or answer.get("tool_calls")):
        answer = None
    return asked, answer


def _encode(
    part: Source,
    tokenizer: Tokenizer,
    template: Template,
    turns: list[Message],
    functions: list[Tool],
) -> Tokens:
    """Conversation with its last answer trained, as training of this source encodes it."""
    if part.turns == "each":
        return encode_answer(tokenizer, template, turns, tools=functions)
    return encode_chat(tokenizer, template, turns, tools=functions, train_on="last")


def _answer_ids(tokens: Tokens, stops: list[int]) -> list[int]:
    """Ids of an answer that training trains, up to the first one that stops generation.

    They are more than the message's own words where a template adds to them: Qwen 3 opens an answer
    with an empty thought, which a trained model therefore writes as well.
    """
    trained = [i for i, weight in enumerate(tokens.mask) if weight]
    if not trained:
        return []
    ids = tokens.ids[trained[0] : trained[-1] + 1]
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
