"""Conversations and what of them is trained: the nouns of finding turns."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from minitune.errors import InputError
from minitune.text.template import Message, Template, Tool, render

# Every turn of the assistant, its last one, or every token.
TrainOn = Literal["assistant", "last", "all"]


# Keys that data sets weigh a message with, by a number or by true and false.
WEIGHT_KEYS = ("weight", "train", "trainable", "loss")


class Turn(NamedTuple):
    """Characters start to end of a rendered conversation, an assistant's turn with its end-of-turn
    token.

    weight: what its tokens count in the loss, 0 for a turn that is not trained.
    """

    start: int
    end: int
    weight: float


class Conversation(NamedTuple):
    """Messages with the template that renders them."""

    template: Template
    messages: Sequence[Message]
    tools: Sequence[Tool]

    def text(self, n: int, add_generation_prompt: bool, mark_generation: bool = False) -> str:
        """Render the first n messages; the arguments are those of `render`."""
        return render(
            self.template,
            self.messages[:n],
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
            mark_generation=mark_generation,
        )


def turn_weights(messages: Sequence[Message], train_on: TrainOn | None) -> dict[int, float]:
    """Weights of the assistant's turns by the number of their message, 0 for those that are not
    trained.

    train_on chooses turns; a chosen one has the weight that its message gives it, 1 if it gives
    none. InputError for a weight that is neither true, false nor a number from 0 to 1.
    """
    weights: dict[int, float] = {}
    for n, message in enumerate(messages):
        if message.get("role") == "assistant":
            weights[n] = _weight(message, n)
    if train_on is None:
        return dict.fromkeys(weights, 0.0)
    if train_on == "last":
        return {n: weight if n == max(weights) else 0.0 for n, weight in weights.items()}
    return weights


def _weight(message: Message, n: int) -> float:
    """Product of the weights that a message has under all the keys for one."""
    weight = 1.0
    for key in WEIGHT_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
            raise InputError(
                f"chat: message {n + 1} (assistant) has {key} = {value!r}, "
                "expected true, false or a number from 0 to 1; correct it"
            )
        weight *= value
    return weight


def without_weights(messages: Sequence[Message]) -> list[Message]:
    """Messages without the weights of the assistant's turns, which are for training and not for the
    template.
    """
    copies: list[Message] = []
    for message in messages:
        keys = WEIGHT_KEYS if message.get("role") == "assistant" else ()
        copies.append({key: value for key, value in message.items() if key not in keys})
    return copies
