"""What a template leaves out of a conversation is refused or counted by name, whatever the template."""

from typing import Any

import pytest

from minitune.errors import InputError
from minitune.text import conversation
from minitune.text.chat import CHATML, PLAIN, encode_chat, encode_prompt
from minitune.text.served import encode_answer, encode_answers
from minitune.text.template import Message, Template, compile_template, render
from support.tokenizers import with_special_tokens

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
MARKUP = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
TOKENIZER, HF = with_special_tokens(NAMES, MARKUP)
TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Templates of the kinds that are published: each drops something.
THINKING = (  # drops the reasoning of history, and opens a thought in its prompt, as R1's does
    "{% for m in messages %}" + TURN + "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
QWEN = (  # writes a thought into the last answer only, an empty one too
    "{% for m in messages %}" + TURN + "{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    + PROMPT
)
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    + TURN
    + "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    + PROMPT
)
CUTS = "{% for m in messages %}" + TURN + "{{ m.content[:8] }}<|im_end|>{% endfor %}" + PROMPT
JOINS = (
    "{% for m in messages %}" + TURN + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}" + PROMPT
)
OBJECTS = (
    "{% for m in messages %}" + TURN + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}" + PROMPT
)
PARTS = (
    "{% for m in messages %}" + TURN + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}" + PROMPT
)
NULL_MEANS_CALL = (
    "{% for m in messages %}" + TURN + "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}" + PROMPT
)
# The first template of Llama 3: it ends with the assistant's header, asked for or not.
HEADER = "{% for m in messages %}" + TURN + "{{ m.content | trim }}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\\n' }}"


def template(source: str) -> Template:
    return compile_template(source, NAMES, "test")


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any) -> Message:
    return assistant("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}])


def spans(source: str, messages: list[Message], **more: Any) -> list[str]:
    """Text of every run of trained tokens."""
    tokens = encode_chat(TOKENIZER, template(source), messages, **more)
    return runs(tokens.ids, tokens.mask)


def runs(ids: list[int], mask: Any) -> list[str]:
    found: list[list[int]] = [[]]
    for i, weight in zip(ids, mask, strict=True):
        if weight:
            found[-1].append(i)
        elif found[-1]:
            found.append([])
    return [TOKENIZER.decode(run, skip_special=False) for run in found if run]


FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
OSLO = '{"city": "Oslo"}'
LOST: list[tuple[str, list[Message], list[Any], str]] = [
    (CHATML, [user("a"), call(OSLO)], [], "the tool_calls of message 2"),
    (PLAIN, [user("a"), call({"city": "Oslo"})], [], "the tool_calls of message 2"),
    (CHATML, [user("a"), assistant("b")], [FUNCTION], "the tools"),
    (CHATML, [user("a"), assistant("b", reasoning_content="r")], [], r"the reasoning_content of message 2 \(assistant\)"),
    (THINKING, [user("a"), assistant("<think>r</think>b")], [], "the reasoning in the content of message 2"),
    (
        KNOWN_ROLES,
        [{"role": "developer", "content": "d"}, user("a"), assistant("b")],
        [],
        r"the content of message 1 \(developer",
    ),
    (KNOWN_ROLES, [user("a"), call(OSLO), {"role": "tool", "content": "9"}, assistant("b")], [], "the tool_calls of message 2"),
    (CUTS, [user("a long question"), assistant("b")], [], r"the content of message 1 \(user\)"),
    (CUTS, [user("a"), assistant("a long answer")], [], r"the content of message 2 \(assistant\)"),
    (PARTS, [user([{"type": "image", "url": "x.png"}, {"type": "text", "text": "a"}]), assistant("b")], [], r"part 1 \(image\)"),
    (QWEN, [user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d")], [], 'message 2.* set turns = "each"'),
]


@pytest.mark.parametrize(("source", "messages", "tools", "message"), LOST)
def test_what_is_lost_is_refused_by_name(source: str, messages: list[Message], tools: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=f"chat: test does not write .*{message}"):
        encode_chat(TOKENIZER, template(source), messages, tools=tools)


def test_what_a_prompt_holds_is_not_lost_either() -> None:
    with pytest.raises(InputError, match=r"does not write the content of message 1 \(developer\)"):
        encode_prompt(TOKENIZER, template(KNOWN_ROLES), [{"role": "developer", "content": "d"}, user("a")])


def test_words_that_stand_elsewhere_are_not_taken_for_those_that_are_lost() -> None:
    with pytest.raises(InputError, match="the reasoning_content of message 2"):
        encode_chat(TOKENIZER, template(CHATML), [user("pears"), assistant("pears", reasoning_content="pears")])


def test_other_keys_and_the_reasoning_of_history_are_counted() -> None:
    tokens = encode_chat(TOKENIZER, template(CHATML), [{**user("a"), "id": 7}, assistant("b", name="bob")])
    assert sorted(tokens.unwritten) == ["id", "name"]
    turns = [user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d")]
    assert list(encode_chat(TOKENIZER, template(QWEN), turns, train_on="last").unwritten) == ["reasoning_content"]
    named = "{% for m in messages %}{{ '<|im_start|>' + (m.name or m.role) + m.content + '<|im_end|>' }}{% endfor %}"
    assert not encode_chat(TOKENIZER, template(named), [user("a"), assistant("b", name="bob")]).unwritten


@pytest.mark.parametrize("arguments", [OSLO, {"city": "Oslo"}])
def test_arguments_come_in_the_form_that_a_template_reads(arguments: Any) -> None:
    assert spans(JOINS, [user("a"), call(arguments)]) == [f"weather {OSLO}<|im_end|>"]
    assert spans(OBJECTS, [user("a"), call(arguments)]) == [f'{{"name": "weather", "arguments": {OSLO}}}<|im_end|>']
    assert spans(NULL_MEANS_CALL, [user("a"), call(arguments)]) == [f"weather{OSLO}<|im_end|>"]


def test_contents_come_in_the_form_that_a_template_reads() -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "pears"}]
    for source, content, written in ((CHATML, parts, "two\npears"), (PARTS, parts, "twopears"), (PARTS, "two", "two")):
        assert spans(source, [user("a"), assistant(content)]) == [f"{written}<|im_end|>"]


def test_a_prompt_that_is_always_appended_is_no_part_of_an_answer() -> None:
    tokens = encode_chat(TOKENIZER, template(HEADER), [user("a"), assistant("b"), user("c"), assistant("d")])
    assert runs(tokens.ids, tokens.mask) == ["b<|im_end|>", "d<|im_end|>"]
    assert TOKENIZER.decode(tokens.ids, skip_special=False).endswith("d<|im_end|>")


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss"])
@pytest.mark.parametrize("source", [CHATML, HEADER])
def test_turns_are_weighed(key: str, source: str) -> None:
    said = [user("a"), assistant("b", **{key: 0}), user("c"), assistant("d", **{key: 1})]
    assert spans(source, said) == ["d<|im_end|>"]
    assert spans(source, [user("a"), assistant("b", **{key: False}), user("c"), assistant("d")]) == ["d<|im_end|>"]
    tokens = encode_chat(TOKENIZER, template(source), [user("a"), assistant("b", **{key: 0.25}), user("c"), assistant("d")])
    assert sorted(set(tokens.mask)) == [0, 0.25, 1]
    assert not tokens.unwritten
    with pytest.raises(
        InputError, match=rf"chat: message 2 \(assistant\) has {key} = 2, expected true, false or a number from 0"
    ):
        spans(source, [user("a"), assistant("b", **{key: 2})])


def test_generation_blocks_are_weighed() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    said = [user("a"), assistant("b", weight=0), user("c"), assistant("d"), user("e"), assistant("f", weight=0)]
    assert spans(source, said) == ["d<|im_end|>"]


def test_each_answer_is_trained_as_it_is_served() -> None:
    said = [user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d"), user("e"), assistant("f", weight=0)]
    texts = [["<think>\nr\n</think>\n\nb<|im_end|>"], ["<think>\n\n</think>\n\nd<|im_end|>"]]
    samples = encode_answers(TOKENIZER, template(QWEN), said)
    assert [runs(sample.ids, sample.mask) for sample in samples] == texts
    for n, sample in zip((1, 3), samples, strict=True):
        prompt = encode_prompt(TOKENIZER, template(QWEN), said[:n])
        assert sample.ids[: len(prompt)] == prompt
        assert list(sample.mask).index(True) == len(prompt)


@pytest.mark.parametrize("more", [{"content": "<think>\nr\n</think>\n\nb"}, {"content": "b", "reasoning": "r"}, {"content": "b"}])
def test_a_thought_that_the_prompt_opens_is_finished(more: dict[str, Any]) -> None:
    said = [user("a"), assistant(**more), user("c"), assistant(**more)]
    thought = "r\n</think>\n\n" if "r" in str(more) and len(str(more)) > 16 else "\n</think>\n\n"
    samples = encode_answers(TOKENIZER, template(THINKING), said)
    assert [runs(sample.ids, sample.mask) for sample in samples] == [[f"{thought}b<|im_end|>"]] * 2
    prompt = encode_prompt(TOKENIZER, template(THINKING), said[:3])
    assert samples[1].ids[: len(prompt)] == prompt


def test_an_answer_is_what_the_template_makes_of_it() -> None:
    for source, answer, wanted in (
        (CHATML, assistant("b"), "b<|im_end|>"),
        (QWEN, assistant("b"), "<think>\n\n</think>\n\nb<|im_end|>"),
        (OBJECTS, call(OSLO), f'{{"name": "weather", "arguments": {OSLO}}}<|im_end|>'),
    ):
        tokens = encode_answer(TOKENIZER, template(source), [user("a"), answer])
        assert runs(tokens.ids, tokens.mask) == [wanted]


LONG = [user("Order two pears and six plums, please."), assistant('{"items": {"pears": 2, "plums": 6}}')]
KEYED = [{**LONG[0], "name": "Ann", "id": "a1"}, LONG[1]]
SHORT = [user("two"), assistant("pears")]


@pytest.mark.parametrize(
    ("messages", "n_renderings"),
    [(LONG, 3), (SHORT, 4), (KEYED, 4), ([*LONG, *LONG], 6), ([*LONG, *LONG, *LONG], 9)],
)
def test_a_conversation_takes_few_renderings(messages: list[Message], n_renderings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole text, prompt of each answer and prompt after it; marks for short texts, one more for keys."""
    count = 0

    def counted(*args: Any, **kwargs: Any) -> str:
        nonlocal count
        count += 1
        return render(*args, **kwargs)

    monkeypatch.setattr(conversation, "render", counted)
    encoded = encode_chat(TOKENIZER, template(CHATML), messages)
    assert any(encoded.mask)
    assert count <= n_renderings


@pytest.mark.parametrize("lost", range(4))
@pytest.mark.parametrize("said", ["Order two pears and six plums, please.", "two"])
def test_a_lost_text_is_missed_though_another_message_says_the_same(lost: int, said: str) -> None:
    """The messages all say the same, and the template leaves one of them out."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if loop.index0 != {lost} %}}{{{{ m.content }}}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [user(said), assistant(said), user(f"{said} {said}"), assistant(said)]
    with pytest.raises(InputError, match=rf"does not write the content of message {lost + 1} "):
        encode_chat(TOKENIZER, template(source), messages)
