"""Model as the harness asks it: ids of a text, scores of continuations, answers, rendered chats."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.inference import generate
from minitune.inference.score import Score, continuations
from minitune.interop.lm_eval_rules import AnswerRules, answer_rules
from minitune.models.model import Model
from minitune.text.template import Message, Template, render
from minitune.text.tokenizer import Tokenizer
from minitune.types import Params

SEED = 1234  # of what a task asks to be drawn: the harness's own
MARK = "\U0010fffd"  # a private character that shows where a rendered message ends


class HarnessModel(NamedTuple):
    """Model, its text, and how it is asked."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    template: Template
    batch_size: int  # requests per forward
    stop_ids: Sequence[int]  # end an answer, as eos does
    max_length: int | None = None  # tokens a row; the model's own limit if None
    # for tasks that name none: the folder's own, which transformers applies
    repetition_penalty: float = 1.0

    @property
    def eos_id(self) -> int:
        """Token that ends a text; InputError if the tokenizer names none."""
        eos_id = self.tokenizer.eos_id
        if eos_id is None:
            raise InputError(
                "lm_eval: the tokenizer has no eos_token, expected one; name it in "
                "tokenizer_config.json"
            )
        return eos_id

    @property
    def prefix_id(self) -> int:
        """Token that a text without a context is scored behind."""
        return self.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def n_max(self) -> int:
        """Tokens of a row at most."""
        return self.max_length or self.model.config.max_positions

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text; bos goes in front where the tokenizer wants it, but for a rendered chat,
        which brings its own.
        """
        if add_bos is None:
            add_bos = not text.startswith(
                self.tokenizer.decode([self.prefix_id], skip_special=False)
            )
        wants_bos = self.tokenizer.add_bos and self.tokenizer.bos_id is not None
        bos = [self.prefix_id] if add_bos and wants_bos else []
        return bos + self.tokenizer.encode(text, parse_special=True)

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Score of each (context, continuation)."""
        return continuations(
            self.model, self.params, pairs, batch_size=self.batch_size, max_length=self.n_max
        )

    def answers(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Answer to each (prompt, generation_kwargs); those with the same rules share batches."""
        by_rules: dict[AnswerRules, list[int]] = {}
        for n, (_, asked) in enumerate(requests):
            rules = answer_rules(asked, self.n_max, self.repetition_penalty)
            by_rules.setdefault(rules, []).append(n)

        texts: dict[int, str] = {}
        for rules, group in by_rules.items():
            width = self.n_max - rules.max_new_tokens
            answers = generate.answers(
                self.model,
                self.params,
                [(self.encode(requests[n][0]) or [self.prefix_id])[-width:] for n in group],
                self.tokenizer,
                **rules._asdict(),
                seed=SEED,
                batch_size=self.batch_size,
                stop_ids=[self.eos_id, *self.stop_ids],
                on_progress=lambda n_answered: None,
            )
            texts |= dict(zip(group, answers, strict=True))
        return [texts[n] for n in range(len(requests))]


def rendered(template: Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Conversation as text, its last turn left open unless a new one is opened; templates that
    refuse system messages get the rest, as in the harness's own backend.
    """
    if not add_generation_prompt:
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": last["content"] + MARK + " "}]
    try:
        text = render(template, messages, add_generation_prompt=add_generation_prompt)
    except InputError:
        rest = [message for message in messages if message["role"] != "system"]
        if len(rest) == len(messages):
            raise
        text = render(template, rest, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    text, mark, tail = text.rpartition(MARK)
    if not mark:
        raise InputError(
            f"lm_eval: {template.origin} leaves out what the last message says, expected it for a "
            "task's gen_prefix"
        )
    # the template strips what a message ends with
    return text if tail.startswith(" ") else text.rstrip()
