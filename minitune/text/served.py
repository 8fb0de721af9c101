"""Answers as they are served: the prompt that generation gets, and then what the model is to write.

Many templates write a turn differently once it is history: they remove its reasoning, or move what
stands before it. An answer that is a sample of its own has the history that a server would send,
and is itself written in full.
"""

from collections.abc import Sequence

from minitune.errors import InputError
from minitune.text.chat import Tokens, encode_chat, encode_prompt
from minitune.text.conversation import Conversation, turn_weights, without_weights
from minitune.text.escaping import escape_special_tokens
from minitune.text.forms import write
from minitune.text.template import REASONING_KEYS, Message, Template, Tool
from minitune.text.tokenizer import Tokenizer
from minitune.text.turns import content_end, content_start, turn_end_when_last
from minitune.text.unwritten import END_OF_THOUGHT

START_OF_THOUGHT = "<think>"


def encode_answer(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
) -> Tokens:
    """Encode a conversation as the prompt of its last message, an answer, and that answer, trained.

    The prompt is what `encode_prompt` gives for the messages before. A prompt that opens a thought
    (<think>) is followed by the message's reasoning, or by none, and the end of the thought.

    InputError if the template writes neither the prompt's end nor the answer's.
    """
    prompt = encode_prompt(tokenizer, template, messages[:-1], tools=tools)
    number = len(messages)
    refusal: InputError | None = None
    try:
        whole = encode_chat(tokenizer, template, messages, tools=tools, train_on="last")
    except InputError as error:
        refusal = error
    else:
        if whole.ids[: len(prompt)] == prompt:
            return _trained_from(whole, len(prompt))
    answer = _answer_after_prompt(tokenizer, template, messages, tools)
    if answer is None:
        raise refusal or InputError(
            f"chat: {template.origin} doesn't end the prompt of message {number} (assistant) as it "
            "begins that message, expected the prompt to be a prefix of the conversation; "
            "correct the template"
        )
    weight = turn_weights(messages, "last")[len(messages) - 1]
    mask = [False] * len(prompt) + [bool(weight) if weight in (0, 1) else weight] * len(answer)
    return Tokens([*prompt, *answer], mask)


def encode_answers(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
) -> list[Tokens]:
    """Encode every trained answer of a conversation as a sample of its own, by `encode_answer`."""
    weights = turn_weights(messages, "assistant")
    trained = [n for n, weight in weights.items() if weight and n > 0]
    return [encode_answer(tokenizer, template, messages[: n + 1], tools=tools) for n in trained]


def _trained_from(whole: Tokens, start: int) -> Tokens:
    """Tokens trained from the end of their prompt to the last token that is trained."""
    trained = [n for n, weight in enumerate(whole.mask) if weight]
    if not trained:
        return whole
    weight = whole.mask[trained[-1]]
    end = trained[-1] + 1
    mask = [weight if start <= n < end else False for n in range(len(whole.ids))]
    return whole._replace(mask=mask)


def _answer_after_prompt(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Tool],
) -> list[int] | None:
    """Ids of an answer whose template writes another prompt before it; None if it is not found."""
    plain = without_weights(messages)
    escaped, escaped_tools, restore = escape_special_tokens(plain, tools, tokenizer)
    conversation = Conversation(template, escaped, escaped_tools)
    # Reasoning that the template removes is written here, where the prompt opens a thought.
    form, text, lost = write(conversation, False, ())
    conversation = conversation._replace(messages=form(escaped))
    last = len(messages) - 1
    prompt = conversation.text(last, True)
    header = prompt.removeprefix(conversation.text(last, False))
    before, opens_thought, _ = header.rpartition(START_OF_THOUGHT)
    is_thought_lost = any(one.is_reasoning and one.message == last for one in lost)
    if is_thought_lost and not opens_thought:
        return None
    words_start = content_start(conversation, last, text)
    words_end = content_end(conversation, last, text)
    if header == prompt or words_start is None:
        return None
    thought = ""
    start = text.rfind(header, 0, words_start)
    if start >= 0:
        start += len(header)
    elif opens_thought and before in text[:words_start]:
        start = text.rfind(before, 0, words_start) + len(before)
        thought = f"{_reasoning(conversation.messages[last])}\n{END_OF_THOUGHT}\n\n".lstrip(" ")
    if start < 0:
        return None
    end = turn_end_when_last(tokenizer, text, text, start, None, words_end)
    if end is None:
        return None
    written = text[start:end]
    answer = thought + written.lstrip() if thought else written
    opens = tokenizer.opens_after(prompt, True)
    return tokenizer.encode_span(answer, starts_document=opens, restore=restore)


def _reasoning(message: Message) -> str:
    """Reasoning that a message holds under a key of its own or in its content, "" for none."""
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            return message[key].strip()
    content = message.get("content")
    if not isinstance(content, str):
        return ""
    thought, _, _ = content.rpartition(END_OF_THOUGHT)
    return thought.strip().removeprefix(START_OF_THOUGHT).strip()
