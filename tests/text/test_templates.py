"""Chat templates built as the well-known families build theirs: text equal to transformers', and the mask of every turn."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from minitune.errors import InputError
from minitune.text.chat import encode_chat, encode_prompt, open_template
from minitune.text.sandbox import GENERATION_END, GENERATION_START
from minitune.text.template import Message, Template, compile_template, render
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from support.tokenizers import texts, wild, with_special_tokens, write_folder

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<|eom|>",
    "<|py|>",
    "[INST]",
    "[/INST]",
]
SPECIAL += [
    "[TOOLS]",
    "[/TOOLS]",
    "[CALLS]",
    "[RESULT]",
    "[/RESULT]",
    "<turn>",
    "</turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
SPECIAL += ["<|end|>", "<|START|>", "<|USER|>", "<|BOT|>", "<|SYS|>", "<|END|>", "<|channel|>", "<|message|>", "<|return|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # tokens, but no special ones, as Qwen 3 has them

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n', messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}
        {% endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}
        {%- set date_string = "26 Jul" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|head|>system<|/head|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: python\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set user_messages = rest | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS] " + tools | map('tojson') | join(', ') + "[/TOOLS]" }}{%- endif %}
        {%- if loop.last and system is defined %}{{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}{{- out[:-1] }}
                {{- ', "n": ' + ns.index | string + "}" }}{% set ns.index = ns.index + 1 %}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{- '[RESULT] {"content": ' + message.content | string + "}[/RESULT]" }}
    {%- else %}{{- raise_exception("only user, assistant and tool") }}{%- endif %}
{%- endfor %}"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set first = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("user and model take turns") }}
        {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}
        {%- endif -%}
    {{ '<turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}
    {{ '</turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<turn>model\\n'}}{%- endif -%}"""
PHI3 = """\
{% for message in messages %}{% if message['role'] in ['system', 'user'] %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
QWEN25 = """\
{%- macro answers(text) %}{{- '<tool_response>\\n' ~ text ~ '\\n</tool_response>' }}{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- messages[0].content if messages[0].role == 'system' else 'Be of help.' }}
    {{- "\\n\\n# Functions\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
        {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- set said = message.role == "assistant" and not message.tool_calls %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) or said %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n' }}{{- answers(message.content) }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson ~ "\\n" }}{%- endfor %}
    {{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(looking=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" %}{%- set ns.looking = false %}{%- set ns.last_query = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role in ("user", "system") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content, reasoning = message.content, '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}{{- '", "arguments": ' }}
                {{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
COMMAND_R = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{%- elif false == true %}{% set rest = messages %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% if system != false %}{{ '<|START|><|SYS|>' + system + '<|END|>' }}{% endif %}
{% for message in rest %}
{% set content = message['content'] %}
{% if message['role'] == 'user' %}{{ '<|START|><|USER|>' + content.strip() + '<|END|>' }}
{%- elif message['role'] == 'assistant' %}{{ '<|START|><|BOT|>'  + content.strip() + '<|END|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|START|><|BOT|>' }}{% endif %}"""
MARKED = """\
{%- macro open(role) %}{{- '<|im_start|>' ~ role ~ '\\n' }}{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- open('assistant') }}{% generation %}
        {%- if message.thinking %}{{- '<think>' ~ message.thinking ~ '</think>' }}{% endif %}
        {{- message.content ~ '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- else %}{{- open(message.role) ~ message.content ~ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- open('assistant') }}{%- endif %}"""
OUTSIDE = MARKED.replace("~ '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}", "}}{% endgeneration %}{{- '<|im_end|>\\n' }}")
HARMONY = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if loop.last and message.thinking is defined and not add_generation_prompt %}
            {{- '<|START|>assistant<|channel|>analysis<|message|>' ~ message.thinking ~ '<|end|>' }}
        {%- endif %}
        {{- '<|START|>assistant<|channel|>final<|message|>' ~ message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}{{- '<|START|>' ~ message.role ~ '<|message|>' ~ message.content ~ '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START|>assistant' }}{%- endif %}"""


def calls(message: Message, form: str) -> list[str]:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [form % (call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in functions]


def qwen25(message: Message, last: bool) -> str:
    written_calls = "".join("\n" + call for call in calls(message, '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'))
    return (message["content"] + written_calls if message["content"] else written_calls.removeprefix("\n")) + "<|im_end|>"


def qwen3(message: Message, last: bool) -> str:
    reasoning, content = message.get("reasoning_content"), message["content"]
    reasoning = reasoning if isinstance(reasoning, str) else ""
    written_calls = calls(message, '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>')
    written_calls = [("\n" if content or n else "") + call for n, call in enumerate(written_calls)]
    thought = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    return (thought if last else content) + "".join(written_calls) + "<|im_end|>"


def llama31(message: Message, last: bool) -> str:
    return "".join(calls(message, '{"name": "%s", "parameters": %s}') or [message["content"].strip()]) + "<|eot|>"


def marked(message: Message, last: bool) -> str:
    thought = message.get("reasoning_content") or ""
    return (f"<think>{thought}</think>" if thought else "") + message["content"] + "<|im_end|>"


class Family(NamedTuple):
    """A template, what it writes for an answer (last: no user speaks after it), and what its conversations may hold."""

    source: str
    answer: Callable[[Message, bool], str]
    system: bool = True
    tools: bool = False


FAMILIES = {
    "chatml": Family(CHATML, lambda message, _: message["content"] + "<|im_end|>"),
    "llama2": Family(LLAMA2, lambda message, _: f" {message['content'].strip()} </s>"),
    "llama31": Family(LLAMA31, llama31, tools=True),
    "gemma": Family(GEMMA, lambda message, _: message["content"].strip() + "</turn>"),
    "phi3": Family(PHI3, lambda message, _: message["content"] + "<|end|>"),
    "zephyr": Family(ZEPHYR, lambda message, _: message["content"] + "</s>"),
    "command_r": Family(COMMAND_R, lambda message, _: message["content"].strip() + "<|END|>"),
    "qwen25": Family(QWEN25, qwen25, tools=True),
    "qwen3": Family(QWEN3, qwen3, tools=True),
    "marked": Family(MARKED, marked),
    "outside": Family(OUTSIDE, marked),
}
RENDERED = {**{name: family.source for name, family in FAMILIES.items()}, "mistral": MISTRAL, "harmony": HARMONY}

FUNCTION = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"é<&>": {"type": "string"}}}},
}
anything = st.one_of(texts, wild)
plain = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12)  # of what templates take apart
arguments = st.dictionaries(plain, st.one_of(plain, st.integers(-9, 9), st.none(), st.lists(plain, max_size=2)), max_size=2)


@st.composite
def conversations(
    draw: st.DrawFn, system: bool, tools: bool, reasoning: str = "every answer", beside_calls: bool = True
) -> tuple[list[Message], list[Any]]:
    """Messages and tools: questions with answers, before some of them a call and its result, some with reasoning."""
    messages: list[Message] = [{"role": "system", "content": draw(anything)}] if system and draw(st.booleans()) else []
    n = draw(st.integers(1, 3))
    contents = ["", "two"] if beside_calls else [""]
    for i in range(n):
        messages.append({"role": "user", "content": draw(anything)})
        if tools and draw(st.booleans()):
            call = {
                "type": "function",
                "function": {"name": draw(st.sampled_from(["weather", "f"])), "arguments": draw(arguments)},
            }
            messages.append({"role": "assistant", "content": draw(st.sampled_from(contents)), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(plain)})
        reasons = reasoning == "every answer" or (reasoning == "last answer" and i == n - 1)
        thought = {"reasoning_content": draw(plain)} if reasons and draw(st.booleans()) else {}
        messages.append({"role": "assistant", "content": draw(anything), **thought})
    return messages, [FUNCTION] if tools and draw(st.booleans()) else []


@cache
def speaker() -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """minitune's and transformers' tokenizers of one folder that has the special tokens of all the templates."""
    return with_special_tokens(NAMES, SPECIAL, PLAIN)


@cache
def template(name: str) -> Template:
    return compile_template(RENDERED[name], NAMES, name)


def spans(ids: Sequence[int], mask: Sequence[bool]) -> list[str]:
    """The text of every run of trained tokens."""
    runs = [[i for i, _ in run] for trained, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]) if trained]
    return [speaker()[0].decode(run, skip_special=False) for run in runs]


def expected(family: Family, messages: Sequence[Message]) -> list[str]:
    """The assistant's turns as the template should write them."""
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            thinks = i > last_user and (i == len(messages) - 1 or bool(message.get("reasoning_content")))
            answers.append(family.answer(message, thinks))
    return answers


@pytest.mark.parametrize("name", RENDERED)
@given(data=st.data(), opened=st.booleans())
def test_rendering_equals_transformers(name: str, data: st.DataObject, opened: bool) -> None:
    messages, tools = data.draw(conversations(True, True))
    messages = messages[: data.draw(st.integers(1, len(messages)))]

    def theirs() -> str | None:
        try:
            return speaker()[1].apply_chat_template(
                messages, tools=tools or None, chat_template=RENDERED[name], tokenize=False, add_generation_prompt=opened
            )
        except Exception:  # a template raises whatever it likes
            return None

    def ours() -> str | None:
        try:
            return render(template(name), messages, tools=tools, add_generation_prompt=opened)
        except InputError:
            return None

    assert ours() == theirs()


# the other templates write no reasoning, which is refused, as is a content that Llama 3.1 drops beside a call
WRITES_REASONING = {"qwen3": "last answer", "marked": "every answer", "outside": "every answer"}


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_trained_spans_are_the_assistants_turns(name: str, data: st.DataObject) -> None:
    family, tokenizer = FAMILIES[name], speaker()[0]
    messages, tools = data.draw(conversations(family.system, family.tools, WRITES_REASONING.get(name, "none"), name != "llama31"))
    turns = expected(family, messages)
    if name == "outside":  # an empty block says nothing, not even that a turn ends after it
        turns = [turn for turn in turns if turn != "<|im_end|>"]
    ids, mask, _ = encode_chat(tokenizer, template(name), messages, tools=tools)
    assert spans(ids, mask) == turns
    last, mask_of_last, _ = encode_chat(tokenizer, template(name), messages, tools=tools, train_on="last")
    ending = family.answer(messages[-1], True)
    assert spans(last, mask_of_last) == ([] if name == "outside" and ending == "<|im_end|>" else [ending])
    every, mask_of_all, _ = encode_chat(tokenizer, template(name), messages, tools=tools, train_on="all")
    assert every == ids
    assert all(mask_of_all)
    # no message wrote a special token, and generation sees what was trained on
    text = render(template(name), [{**m, "content": "x"} for m in messages], tools=[], add_generation_prompt=False)
    special = set(tokenizer.special.values())
    if not tools and not any(m.get("tool_calls") for m in messages):
        assert [i for i in ids if i in special] == [i for i in tokenizer.encode(text, parse_special=True) if i in special]
    if name != "outside" or messages[-1]["content"] or messages[-1].get("reasoning_content"):
        assert last[: mask_of_last.index(True)] == encode_prompt(tokenizer, template(name), messages[:-1], tools=tools)


@pytest.mark.parametrize("name", ["chatml", "gemma", "qwen25", "qwen3", "command_r", "phi3", "marked"])
@given(data=st.data())
def test_ids_equal_transformers(name: str, data: st.DataObject) -> None:
    """Of words: what looks like a special token in a message is text here and a token there."""
    word = st.lists(st.sampled_from(["two", " ", "apples", "7", "\n", "é"]), max_size=5).map("".join)
    messages = [{"role": role, "content": data.draw(word)} for role in ["user", "assistant"] * data.draw(st.integers(1, 3))]
    theirs = speaker()[1].apply_chat_template(messages, chat_template=RENDERED[name], tokenize=True, return_dict=False)
    ids, mask, _ = encode_chat(speaker()[0], template(name), messages)
    assert speaker()[0].decode(ids, skip_special=False) == speaker()[0].decode(theirs, skip_special=False)
    special = set(speaker()[0].special.values())
    # ours are cut where an answer begins; where whitespace stands on that border, a tokenizer may join what we keep apart
    if all(not message["content"][:1].isspace() for message in messages):
        assert ids == theirs
    assert [i for i in ids if i in special] == [i for i in theirs if i in special]
    if name == "marked":
        rendered = speaker()[1].apply_chat_template(
            messages, chat_template=RENDERED[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if rendered["input_ids"] == ids:
            assert [bool(one) for one in rendered["assistant_masks"]] == mask


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def test_a_template_that_moves_its_tools_trains_the_last_turn_alone() -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    tokenizer = speaker()[0]
    assert spans(*encode_chat(tokenizer, template("mistral"), messages)[:2]) == [" b</s>", " d</s>"]
    assert spans(*encode_chat(tokenizer, template("mistral"), messages, tools=[FUNCTION], train_on="last")[:2]) == [" d</s>"]
    with pytest.raises(
        InputError, match=r'chat: mistral .* message 2 \(assistant\) .*; correct the template or set train_on = "last"'
    ):
        encode_chat(tokenizer, template("mistral"), messages, tools=[FUNCTION])


def test_a_turn_that_ends_in_another_way_as_history_is_refused_and_not_guessed() -> None:
    messages = [user("a"), assistant("b", thinking="t"), user("c"), assistant("d", thinking="t")]
    tokenizer = speaker()[0]
    ended = "<|channel|>analysis<|message|>t<|end|><|START|>assistant<|channel|>final<|message|>d<|return|>"
    assert spans(*encode_chat(tokenizer, template("harmony"), messages, train_on="last")[:2]) == [ended]
    with pytest.raises(InputError, match=r'chat: harmony .* message 2 \(assistant\).* train_on = "last"'):
        encode_chat(tokenizer, template("harmony"), messages)


@pytest.mark.parametrize("name", ["harmony", "mistral"])
def test_what_can_not_be_trained_on_can_be_talked_to(name: str) -> None:
    messages, tokenizer = [user("a"), assistant("b", thinking="t"), user("c")], speaker()[0]
    functions = [FUNCTION] if name == "mistral" else []  # the other template writes none
    text = render(template(name), messages, tools=functions, add_generation_prompt=True)
    prompt = encode_prompt(tokenizer, template(name), messages, tools=functions)
    assert tokenizer.decode(prompt, skip_special=False) == text
    plain = [user("a"), assistant("b"), user("c"), assistant("d")]
    every = encode_chat(tokenizer, template(name), plain, tools=functions, train_on="all")
    assert all(every.mask)


def test_an_empty_block_of_generation_is_no_turn() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {% generation %}{% if m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}"
        "{% endgeneration %}{% if m.role != 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    chat_template = compile_template(source, NAMES, "test")
    assert spans(*encode_chat(speaker()[0], chat_template, messages)[:2]) == ["b<|end|>", "d<|end|>"]
    assert spans(*encode_chat(speaker()[0], chat_template, messages, train_on="last")[:2]) == ["d<|end|>"]


def test_the_last_turn_of_a_conversation_without_one() -> None:
    for name in ("chatml", "marked"):
        ids, mask, _ = encode_chat(speaker()[0], template(name), [user("a")], train_on="last")
        assert not any(mask)
        assert encode_chat(speaker()[0], template(name), [user("a")], train_on="all").mask == [True] * len(ids)


def test_a_block_of_generation_that_nothing_ends_is_refused() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} then<|im_end|>{% endfor %}"
    with pytest.raises(InputError, match=r"chat: test writes no special token at the end of a generation block, expected one"):
        encode_chat(speaker()[0], compile_template(source, NAMES, "test"), [user("a"), assistant("b")])


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}a{% generation %}b{% endgeneration %}{{ eos_token }}{% endgeneration %}",
        "{% set x %}{% generation %}a{{ eos_token }}{% endgeneration %}{% endset %}{{ x | upper | length }}{{ eos_token }}",
    ],
)
def test_blocks_of_generation_that_are_taken_apart_are_refused(source: str) -> None:
    with pytest.raises(
        InputError, match=r"chat: test changes what its generation blocks wrote, expected one after the other; take"
    ):
        encode_chat(speaker()[0], compile_template(source, NAMES, "test"), [user(""), assistant("")])


def test_the_marks_are_plain_characters_to_everybody_else() -> None:
    messages = [
        user(f"a{GENERATION_START}b{GENERATION_END}"),
        assistant(f"{GENERATION_END}c{GENERATION_START}", thinking=GENERATION_START),
    ]
    ids, mask, _ = encode_chat(speaker()[0], template("marked"), messages)
    assert spans(ids, mask) == [f"<think>{GENERATION_START}</think>{GENERATION_END}c{GENERATION_START}<|im_end|>"]
    assert f"a{GENERATION_START}b{GENERATION_END}" in speaker()[0].decode(ids, skip_special=False)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_each_of_its_names(key: str) -> None:
    messages = [user("a"), assistant("b", **{key: "why"})]
    theirs = speaker()[1].apply_chat_template(messages, chat_template=QWEN3, tokenize=False)
    assert render(template("qwen3"), messages, add_generation_prompt=False) == theirs
    assert "<think>\nwhy\n</think>" in theirs
    assert "<think>why</think>" in render(template("marked"), messages, add_generation_prompt=False)


def test_a_template_for_tools_is_used_where_there_are_some() -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN25}]
    folder = write_folder(None, {**NAMES, "chat_template": named})
    (folder / "tokenizer.json").write_text(speaker()[1].backend_tokenizer.to_str(), encoding="utf-8")
    tokenizer, theirs = open_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    chat_template = open_template(folder, tokenizer)
    for tools in ([], [FUNCTION]):
        expected = theirs.apply_chat_template([user("a"), assistant("b")], tools=tools or None, tokenize=False)
        assert render(chat_template, [user("a"), assistant("b")], tools=tools, add_generation_prompt=False) == expected
        assert spans(*encode_chat(tokenizer, chat_template, [user("a"), assistant("b")], tools=tools)[:2]) == ["b<|im_end|>"]
