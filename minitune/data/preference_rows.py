"""Rows of preference data: from the formats that TRL documents to tokenized answers.

Only the answer is trained: the last message, with its end-of-turn token.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from minitune.data.conversations import conversation, opening, split_answer, tools
from minitune.data.encoded_rows import Refused, encoded_rows
from minitune.data.readers import error_location
from minitune.data.row_weights import refuse_weight
from minitune.data.source import Source, column
from minitune.errors import InputError
from minitune.text.chat import Tokens, encode_chat
from minitune.text.template import Message, Template, with_options
from minitune.text.tokenizer import Tokenizer


def conversations(
    row: Mapping[str, Any], source: Source, where: str
) -> list[tuple[list[Message], bool]]:
    """Conversations of a row, each ending with an answer, and whether that is the chosen (or a
    desirable) one.

    prompt is a string (a user's message) or messages. An answer is a string, messages, or a whole
    conversation that begins with the prompt; chosen_conversations and rejected_conversations are
    answers too. A row of format unpaired may be a pair: it gives a desirable answer and one that is
    not. InputError for anything else; where = "file:line".
    """
    row = _plain_names(row, source)
    labels = _labels(row, source, where)
    answers = [_answer(row, name, source, where) for name in labels]
    # An answer that is a string needs a prompt; one that is a list may hold it.
    needs_prompt = _has(row, "prompt", source) or any(isinstance(one, str) for one in answers)
    prompt = column(row, "prompt", (str, list), source, where) if needs_prompt else []
    whole = [_with_prompt(prompt, answer, where) for answer in answers]
    if whole[0][0] != whole[-1][0]:
        raise InputError(
            f"data: {where} has answers to different prompts, expected one at the start of both; "
            "correct the line"
        )
    whole = [opening(row, source, where, turns) for turns in whole]
    for turns in whole:
        asked, _ = split_answer(turns, where)
        if not asked:
            raise InputError(
                f"data: {where} has an answer to nothing, expected a prompt before it; correct "
                "the line"
            )
    return list(zip(whole, labels.values(), strict=True))


def _labels(row: Mapping[str, Any], source: Source, where: str) -> dict[str, bool]:
    """Columns of a row's answers, and whether each is the chosen or a desirable one."""
    is_pair = _has(row, "chosen", source) and not _has(row, "completion", source)
    if source.format == "unpaired" and not is_pair:
        return {"completion": _label(row, source, where)}
    return {"chosen": True, "rejected": False}


def _has(row: Mapping[str, Any], name: str, source: Source) -> bool:
    """True if a row has the column that the source calls by this name."""
    return source.columns.get(name, name) in row


def _label(row: Mapping[str, Any], source: Source, where: str) -> bool:
    """Label of an answer: true or false, or 1 or 0."""
    label = column(row, "label", (bool, int), source, where)
    if label not in (0, 1):
        key = source.columns.get("label", "label")
        raise InputError(
            f'data: {where} "{key}" is {label}, expected true or false, or 1 or 0; correct the line'
        )
    return bool(label)


def _answer(row: Mapping[str, Any], name: str, source: Source, where: str) -> str | list[Any]:
    """Answer of a row: a string, or messages; a single message stands for a list of it."""
    answer = column(row, name, (str, list, dict), source, where)
    return [answer] if isinstance(answer, dict) else answer


def tokenized(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    refused: list[Refused] | None = None,
) -> Iterator[tuple[str, list[tuple[Tokens, bool]]]]:
    """Yield ("file:line", answers) of every row; answers: (tokens, whether it is the chosen or a
    desirable one).

    Of the tokens only the last message is trained. refused gets the rows that
    invalid = "skip" leaves out.
    """
    template = with_options(template, source.chat_template_kwargs, source.path_names)

    def encode(row: Mapping[str, Any], where: str) -> list[tuple[Tokens, bool]]:
        answers = []
        refuse_weight(row, where)
        functions = tools(row, source, where)
        for turns, is_desirable in conversations(row, source, where):
            with error_location(where):
                tokens = encode_chat(tokenizer, template, turns, tools=functions, train_on="last")
            if any(weight not in (0, 1) for weight in tokens.mask):
                raise InputError(
                    f"data: {where} weighs an answer by a fraction, expected 0 or 1 where answers "
                    "are compared; correct it"
                )
            answers.append((tokens, is_desirable))
        return answers

    return encoded_rows(source, encode, [] if refused is None else refused)


def _plain_names(row: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """Row with chosen_conversations and rejected_conversations called chosen and rejected, if these
    names are free.
    """
    aliases = {f"{name}_conversations": name for name in ("chosen", "rejected")}
    if any(name in row or name in source.columns for name in aliases.values()):
        return row
    return {aliases.get(key, key): value for key, value in row.items()}


def _with_prompt(prompt: str | list[Any], answer: str | list[Any], where: str) -> list[Message]:
    """Prompt and answer as one conversation; an answer that holds the prompt already, as in some
    data sets, keeps it once.
    """
    asked: list[Message] = []
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    elif prompt:
        asked = conversation(prompt, where)
    if isinstance(answer, str):
        return [*asked, {"role": "assistant", "content": answer}]
    turns = conversation(answer, where)
    if isinstance(prompt, str):
        holds_prompt = turns[0]["role"] != "assistant"
    else:
        holds_prompt = turns[: len(asked)] == asked
    return turns if holds_prompt else [*asked, *turns]
