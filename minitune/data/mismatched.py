"""Answers to another prompt, which single answers are compared with."""

import numpy as np

from minitune.data.token_store import Document, Documents
from minitune.errors import InputError


def mismatched_answers(answers: Documents, path: str) -> np.ndarray:
    """For each answer, the number of one to another prompt.

    That is the answer half the data away or, if that has the same prompt, the next one after it
    that has not. InputError if all answers are to one prompt.
    """
    numbers: dict[bytes, int] = {}  # of the prompts
    prompts = []  # the number of each answer's prompt
    for i in range(len(answers.offsets) - 1):
        answer = answers.at(i)
        prompt = answer.tokens[: answer_start(answer)].tobytes()
        prompts.append(numbers.setdefault(prompt, len(numbers)))
    if len(numbers) < 2:
        raise InputError(
            f"data: {path} has answers to one prompt only, expected two or more: each is compared "
            "with an answer to another one"
        )
    n = len(prompts)
    # next_other[i]: the next answer after i, in a circle, to another prompt. Built from the last
    # answer to the first, and twice round, because a run of answers to one prompt may span the end.
    next_other = [0] * n
    for i in [*range(n - 1, -1, -1)] * 2:
        after = (i + 1) % n
        next_other[i] = after if prompts[after] != prompts[i] else next_other[after]
    mismatched = []
    for i in range(n):
        opposite = (i + n // 2) % n
        mismatched.append(opposite if prompts[opposite] != prompts[i] else next_other[opposite])
    return np.array(mismatched, dtype=np.int64)


def answer_start(document: Document) -> int:
    """Place of the first trained token, where the answer begins."""
    return int(document.mask.argmax())


def swap_answer(asked: Document, other: Document, seq_len: int) -> Document:
    """Prompt of one document with the answer of the other, cut to seq_len tokens.

    Some of the answer always fits, because the prompt left room for an answer of its own.
    """
    i = answer_start(asked)
    j = answer_start(other)
    tokens = np.concatenate([asked.tokens[:i], other.tokens[j:]])
    mask = np.concatenate([asked.mask[:i], other.mask[j:]])
    return Document(tokens[:seq_len], mask[:seq_len])
