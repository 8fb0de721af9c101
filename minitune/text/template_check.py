"""Check of a chat template on the conversations of a table: does it write earlier answers as it
wrote them last, and does it append a prompt that nobody asked for?
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import msgspec

from minitune.errors import InputError
from minitune.text.conversation import Conversation, without_weights
from minitune.text.forms import write
from minitune.text.template import Message, Template, Tool
from minitune.text.turns import appends_prompt, content_end

MOST_CONVERSATIONS = 200  # that are looked at


class TemplateCheck(msgspec.Struct, frozen=True):
    """Conversations by what their template does with them.

    n_rewritten: an earlier answer is written differently once another follows, so that what is
    trained there is not what a server sends back. n_prompted: a generation prompt ends them.
    """

    n_conversations: int
    n_with_history: int  # with more than one answer
    n_rewritten: int
    n_prompted: int


def template_check(
    template: Template, conversations: Iterable[tuple[Sequence[Message], Sequence[Tool]]]
) -> TemplateCheck:
    """Counts over the first conversations, (messages, tools) each, that the template writes."""
    counts = [0, 0, 0, 0]
    for messages, tools in islice(conversations, MOST_CONVERSATIONS):
        conversation = Conversation(template, without_weights(messages), tools)
        try:
            form, text, _ = write(conversation, False, ())
            conversation = conversation._replace(messages=form(conversation.messages))
            found = (
                True,
                len(_answers(conversation)) > 1,
                _is_rewritten(conversation, text),
                _is_prompted(conversation, text),
            )
        except InputError:
            continue  # refused rows are counted where rows are tokenized
        counts = [n + is_found for n, is_found in zip(counts, found, strict=True)]
    return TemplateCheck(*counts)


def _answers(conversation: Conversation) -> list[int]:
    """Numbers of the assistant's messages."""
    roles = [message.get("role") for message in conversation.messages]
    return [n for n, role in enumerate(roles) if role == "assistant"]


def _is_rewritten(conversation: Conversation, text: str) -> bool:
    """True if the text of a conversation does not begin with that up to each earlier answer."""
    for n in _answers(conversation)[:-1]:
        as_last = conversation.text(n + 1, add_generation_prompt=False)
        # What comes after the words may differ: a template may append a prompt there.
        end = content_end(conversation, n, as_last)
        if not text.startswith(as_last[:end]):
            return True
    return False


def _is_prompted(conversation: Conversation, text: str) -> bool:
    """True if a generation prompt that nobody asked for ends the text of a conversation."""
    n = len(conversation.messages)
    if conversation.messages[-1].get("role") != "assistant":
        return False
    with_prompt = conversation.text(n, add_generation_prompt=True)
    return appends_prompt(conversation, n, text, with_prompt)
