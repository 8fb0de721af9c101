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
from minitune.text.turns import content_end, content_start, n_equal_at_start, turn_end_when_last
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
    found = _answer_after_prompt(tokenizer, template, messages, tools)
    if found is None:
        raise refusal or InputError(
            f"chat: {template.origin} doesn't end the prompt of message {number} (assistant) as it "
            "begins that message, expected the prompt to be a prefix of the conversation; "
            "correct the template"
        )
    answer, lost = found
    weight = turn_weights(messages, "last")[len(messages) - 1]
    mask = [False] * len(prompt) + [bool(weight) if weight in (0, 1) else weight] * len(answer)
    return Tokens([*prompt, *answer], mask, lost)


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
) -> tuple[list[int], list[str]] | None:
    """Ids of an answer whose template writes another prompt before it; None if it is not found.

    With them come the keys of what the template does not write, one for each message.
    """
    plain = without_weights(messages)
    escaped, escaped_tools, restore = escape_special_tokens(plain, tools, tokenizer)
    conversation = Conversation(template, escaped, escaped_tools)
    # Reasoning that the template removes is written here, where the prompt opens a thought.
    form, text, lost = write(conversation, False, ())
    conversation = conversation._replace(messages=form(escaped))
    last = len(messages) - 1
    history, prompt = conversation.text(last, False), conversation.text(last, True)
    header = prompt.removeprefix(history)
    words_start = content_start(conversation, last, text)
    is_thought_lost = any(one.is_reasoning and one.message == last for one in lost)
    if header == prompt or words_start is None:
        return None
    if is_thought_lost and not _opens_thought(header):
        return None
    # Earlier turns begin with the same header.
    before_words = text[n_equal_at_start(history, text) : words_start]
    start, thought = _start(header, before_words, conversation.messages[last])
    if start is None:
        return None
    written = _until_end(tokenizer, conversation, text, words_start - len(before_words) + start)
    if written is None:
        return None
    answer = thought + written.lstrip() if thought else written
    opens = tokenizer.opens_after(prompt, True)
    ids = tokenizer.encode_span(answer, starts_document=opens, restore=restore)
    return ids, [one.key for one in lost if not (one.is_reasoning and one.message == last)]


def _opens_thought(header: str) -> bool:
    """Return True if a prompt ends in a thought that is open.

    Without thinking it ends with an empty one, and the model goes on after that.
    """
    _, opened, after = header.rpartition(START_OF_THOUGHT)
    return bool(opened) and END_OF_THOUGHT not in after


def _start(header: str, before_words: str, answer: Message) -> tuple[int | None, str]:
    """(place where an answer begins, thought that its template leaves out).

    header: what the prompt ends with; before_words: text from there to the answer's own words.
    """
    start = before_words.rfind(header)
    if start >= 0:
        return start + len(header), ""
    before_thought, _, _ = header.rpartition(START_OF_THOUGHT)
    if _opens_thought(header) and before_thought in before_words:
        start = before_words.rfind(before_thought) + len(before_thought)
        return start, f"{_reasoning(answer)}\n{END_OF_THOUGHT}\n\n".lstrip(" ")
    return None, ""


def _until_end(
    tokenizer: Tokenizer,
    conversation: Conversation,
    text: str,
    start: int,
) -> str | None:
    """Answer from its start to the token that ends it; None if there is none."""
    words_end = content_end(conversation, len(conversation.messages) - 1, text)
    end = turn_end_when_last(tokenizer, text, text, start, None, words_end)
    if end is not None:
        return text[start:end]
    token = _token_of_next_turn(tokenizer, conversation)
    return None if token is None else text[start:] + token


def _token_of_next_turn(tokenizer: Tokenizer, conversation: Conversation) -> str | None:
    """Special token with which the template begins the message after the last one, an answer.

    Where no token ends a turn, as in GLM 4, the model stops by beginning the turn of the user, or
    that of the tool which it calls. None if no special token begins it.
    """
    *asked, answer = conversation.messages
    # Without its reasoning, as the next message may make the template remove that.
    plain = {key: value for key, value in answer.items() if key not in REASONING_KEYS}
    if isinstance(plain.get("content"), str):
        plain["content"] = plain["content"].rpartition(END_OF_THOUGHT)[2]
    role = "tool" if answer.get("tool_calls") else "user"
    turns = [*asked, plain, {"role": role, "content": "?"}]
    longer = conversation._replace(messages=turns)
    try:
        text = longer.text(len(turns) - 1, add_generation_prompt=False)
        with_next = longer.text(len(turns), add_generation_prompt=False)
    except InputError:
        return None
    token = tokenizer.find_special.match(with_next, len(text))
    if token is None or not with_next.startswith(text):
        return None
    return token.group()


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


def stop_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Tokens that end an answer: the special token that ends it as it is served, and eos."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    turn = encode_answer(tokenizer, template, messages)
    last_trained = [i for i, trained in zip(turn.ids, turn.mask, strict=True) if trained][-1]
    stops = []
    if last_trained in tokenizer.special.values():
        stops.append(last_trained)
    if tokenizer.eos_id is not None and tokenizer.eos_id not in stops:
        stops.append(tokenizer.eos_id)
    return stops
