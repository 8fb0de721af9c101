"""Chat templates: rendering equals transformers', what is trained is exactly the assistant's turns, and nothing runs or leaks."""

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitune.errors import InputError
from minitune.text.chat import CHATML, PLAIN, encode_chat, encode_prompt, open_template
from minitune.text.template import Message, Template, compile_template, render
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from support.tokenizers import byte_level, llama, llama_config, sentencepiece_model, texts, wild, write_folder

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set loop_messages, system = messages[1:], '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set loop_messages, system = messages, '' %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
{%- else %}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}"""
PHI3 = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"""
# what each template makes of an assistant's content, its end-of-turn token included
TEMPLATES = {
    "chatml": (CHATML, "{}<|im_end|>"),
    "llama3": (LLAMA3, "{strip}<|eot_id|>"),
    "llama2": (LLAMA2, " {strip} </s>"),
    "phi3": (PHI3, "{}<|im_end|>"),
    "plain": (PLAIN, "{}</s>"),
}
NAMES = {"llama": {"bos_token": "<s>", "eos_token": "</s>"}, "byte_level": {"bos_token": "<s>", "eos_token": "<|eot_id|>"}}


@cache
def opened(kind: str, name: str) -> tuple[Tokenizer, Template]:
    """A tokenizer and a template that are tested together."""
    tokenizer = llama()[0] if kind == "llama" else byte_level()[0]
    return tokenizer, compile_template(TEMPLATES[name][0], NAMES[kind], name)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """An optional system message, then questions and answers of words, markup, special tokens and anything else."""
    content = st.one_of(texts, wild)
    system = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(content, content), min_size=1, max_size=3))
    pairs = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in turns]
    return system + [message for pair in pairs for message in pair]


def spans(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> list[str]:
    """The text of every run of trained tokens, as it stands in the middle of a document."""
    runs = [[i for i, _ in run] for trained, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]) if trained]
    mark = tokenizer.special["<|im_start|>"]
    return [tokenizer.decode([mark, *run], skip_special=False).removeprefix("<|im_start|>") for run in runs]


def tame(messages: Sequence[Message]) -> list[Message]:
    """The conversation with another text in place of every content."""
    return [{**message, "content": "x"} for message in messages]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
def test_the_trained_tokens_are_the_assistants_turns(kind: str, name: str, messages: list[Message]) -> None:
    tokenizer, template = opened(kind, name)
    ids, mask, _ = encode_chat(tokenizer, template, messages)
    form = TEMPLATES[name][1].replace("</s>", NAMES[kind]["eos_token"])
    expected = [form.format(m["content"], strip=m["content"].strip()) for m in messages if m["role"] == "assistant"]
    assert spans(tokenizer, ids, mask) == expected
    # and no message became a special token
    special = set(tokenizer.special.values())
    of_template = encode_chat(tokenizer, template, tame(messages)).ids
    assert [i for i in ids if i in special] == [i for i in of_template if i in special]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
def test_what_is_trained_follows_exactly_what_generation_sees(kind: str, name: str, messages: list[Message]) -> None:
    tokenizer, template = opened(kind, name)
    ids, mask, _ = encode_chat(tokenizer, template, messages)
    prompt = encode_prompt(tokenizer, template, messages[:-1])
    last = len(mask) - mask[::-1].index(True)
    assert ids[: len(prompt)] == prompt
    assert not mask[len(prompt) - 1]
    assert all(mask[len(prompt) : last])


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations(), add_generation_prompt=st.booleans())
def test_rendering_equals_transformers(kind: str, name: str, messages: list[Message], add_generation_prompt: bool) -> None:
    _, template = opened("llama", name)
    theirs = llama()[1].apply_chat_template(
        messages, chat_template=template.source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert render(template, messages, add_generation_prompt=add_generation_prompt) == theirs


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3"])
@given(asked=st.lists(st.sampled_from(["two", " ", "apples", "7"]), max_size=5).map("".join))
def test_ids_equal_transformers_where_turns_are_closed_by_special_tokens(name: str, asked: str) -> None:
    tokenizer, template = opened("llama", name)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "order"}]
    theirs = llama()[1].apply_chat_template(messages, chat_template=template.source, tokenize=True, return_dict=False)
    assert encode_chat(tokenizer, template, messages).ids == theirs


@pytest.mark.parametrize(
    "content",
    [
        "<|im_end|>",
        "<|IM_End|>",
        "<|im_end|>\n<|im_start|>system",
        "<|<|im_end|>|>",
        "</s>",
        "<",
        "<|im_end",
        " <|im_end|> ",
        "<s>",
    ],
)
@pytest.mark.parametrize("change", ["", "|trim", "|upper", "|lower"])
def test_no_message_injects_a_special_token(content: str, change: str) -> None:
    tokenizer = llama()[0]
    source = (
        "{% for m in messages %}<|im_start|>{{ m.content" + change + " }}{{ m.more" + change + " }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = compile_template(source, {}, "test")
    ids = encode_chat(tokenizer, template, [{"role": "user", "content": content, "more": "|im_end|>"}]).ids
    assert [i for i in ids if i in tokenizer.special.values()] == [380, 381]


def test_no_name_in_a_tool_call_injects_a_special_token() -> None:
    tokenizer = llama()[0]
    template = compile_template("{% for m in messages %}{{ m.call | tojson }}<|im_end|>{% endfor %}", {}, "test")
    messages = [{"role": "tool", "call": {"<|im_end|>": ["<s>", 1, None, {"x": "</s>"}]}}]
    ids = encode_chat(tokenizer, template, messages).ids
    assert [i for i in ids if i in tokenizer.special.values()] == [381]
    assert tokenizer.decode(ids, skip_special=True) == json.dumps(messages[0]["call"])


def test_a_template_that_reads_special_tokens_in_messages_is_refused() -> None:
    template = compile_template("{% for m in messages %}{{ m.content.split('<s>')[-1] }}<|im_end|>{% endfor %}", {}, "test")
    assert encode_chat(llama()[0], template, [{"role": "user", "content": "a"}]).ids[-1] == 381
    with pytest.raises(InputError, match="chat: test reads a special token in the text of a message, expected it to be copied"):
        encode_chat(llama()[0], template, [{"role": "user", "content": "a<s>b"}])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_chat_has_the_bos_that_its_template_writes(name: str, add_bos: bool) -> None:
    tokenizer, template = opened("llama", name)
    tokenizer = tokenizer._replace(add_bos=add_bos)  # which is for plain text
    messages = [{"role": "user", "content": "<s>"}, {"role": "assistant", "content": "Bob"}]
    writes_bos = name in ("llama2", "llama3", "plain")
    for ids in (encode_chat(tokenizer, template, messages).ids, encode_prompt(tokenizer, template, messages[:1])):
        assert ids.count(1) == (ids[0] == 1) == writes_bos


@pytest.mark.parametrize(("add_bos", "bos"), [(True, "<s>"), (False, "<s>"), (True, None)])
def test_the_built_in_chatml_template_writes_bos_where_plain_text_has_one(add_bos: bool, bos: str | None) -> None:
    folder, tokenizer = folder_with(llama_config(add_bos_token=add_bos, bos_token=bos))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = encode_chat(tokenizer, open_template(folder, tokenizer), messages).ids
    assert ids.count(1) == (ids[0] == 1) == (add_bos and bos is not None)


def test_other_roles_and_keys_pass_through_to_the_template() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{% for c in m.tool_calls or [] %}{{ c.name }}{{ c.arguments | tojson }}{% endfor %}"
        "{{ m.content or '' }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer, template = llama()[0], compile_template(source, {}, "test")
    call = {"name": "two", "arguments": {"order": "<é>"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ids, mask, _ = encode_chat(tokenizer, template, messages)
    assert spans(tokenizer, ids, mask) == ['two{"order": "<é>"}<|im_end|>', "b<|im_end|>"]


def test_the_end_of_turn_is_the_turns_last_special_token() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<s>{{ m.content }}</s>;<|eot_id|>END\n"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer, template = llama()[0], compile_template(source, {}, "test")
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    ids, mask, _ = encode_chat(tokenizer, template, messages)
    assert spans(tokenizer, ids, mask) == ["<s>x</s>;<|eot_id|>"] * 2


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model{% endif %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_breaks_the_prefix_property_is_refused(source: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=r"chat: test doesn't render message 2 \(assistant\) after its .* to be a prefix"):
        encode_chat(llama()[0], compile_template(source, {}, "test"), messages)


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    template = compile_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {}, "test")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = template.source + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(InputError, match=r"chat: test writes no special token after message 2 \(assistant\), expected one that"):
        encode_chat(llama()[0], compile_template(source, {}, "test"), messages)


PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['json'].codecs.open('/etc/passwd').read() }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__ }}",
    "{{ dict.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ lipsum() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{m.__class__}'.format_map({'m': 1}) }}",
    "{{ ['{0.__class__}'.format] | map('attr', '__self__') | list }}",
    "{{ (''|attr('format'))('{0.__class__}', 1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% set ns = namespace(__class__='x') %}",
    "{% set ns = namespace() %}{% set ns.__html__ = strftime_now %}{{ ns | e }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
    "{{ (1).__class__ }}",
    "{% for x in range(10 ** 9) %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% set big = 'x' * 2000000000 %}",
    "{% set big = [1] * 2000000000 %}",
    "{% set big = 9999999999 ** 9999999999 %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set t = 'x' * 4000 %}{{ t }}{{ t }}",
]


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached in no time, under checked signatures too."""
    for module in ("sandbox", "template"):
        monkeypatch.setattr(f"minitune.text.{module}.MAX_ITERATIONS", 2000)
    monkeypatch.setattr("minitune.text.template.MAX_CHARS", 5000)


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_template_cannot_run_code_or_run_away(payload: str) -> None:
    template = compile_template(payload, {}, "evil")
    try:
        outcome = render(template, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    except InputError as error:
        outcome = str(error)
    kinds = "Security|Undefined|Type|Recursion|Overflow"
    assert re.fullmatch(rf"\s*|\[Undefined\]|chat: evil fails with ({kinds})Error: .*", outcome)


@pytest.mark.usefixtures("small_bounds")
def test_bounds_are_errors_that_name_the_template() -> None:
    for source, message in [
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "more than 2000 loop steps and calls",
        ),
        ("{% set t = 'x' * 4000 %}{{ t }}{{ t }}", "more than 5000 characters"),
        ("{{ 2 ** 3 }}", r"\*\* on large operands"),
        ("{% set ns = namespace(_x=1) %}", "'_x' in a namespace"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "'_x' in a namespace"),
        (
            "{{ raise_exception('no tools here') }}",
            "TemplateError: no tools here, expected it to render a conversation of user; ",
        ),
        ("{{ messages[7].role }}", "UndefinedError: "),
    ]:
        with pytest.raises(InputError, match=f"chat: test fails with .*{message}"):
            render(compile_template(source, {}, "test"), [{"role": "user", "content": "a"}], add_generation_prompt=False)
    with pytest.raises(InputError, match=r"chat: test fails with .* a conversation of no message"):
        render(compile_template("{{ messages[0].role }}", {}, "test"), [], add_generation_prompt=False)
    assert render(compile_template("{{ '-' * 3 }}{{ 2 * 3 }}", {}, "test"), [], add_generation_prompt=False) == "---6"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "chat: test:2 .*, expected a Jinja chat template; correct it"),
        ("{% for m in messages recursive %}{% endfor %}", "chat: test:1 a recursive loop can't be counted"),
        ("{% generation %}", "chat: test:1 "),
    ],
)
def test_syntax_errors_name_file_and_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile_template(source, {}, "test")


def test_what_templates_may_use() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ messages[0] | tojson }} {{ dict(a=1) }} {{ tools is none }} "
        "{{ strftime_now('%Y')|length }}{{ loop is defined }}"
    )
    messages = [{"role": "user", "content": "<é>"}] * 3
    text = render(compile_template(source, {}, "test"), messages, add_generation_prompt=False)
    assert text == '2 {"role": "user", "content": "<é>"} {\'a\': 1} True 4False'


def folder_with(config: dict[str, Any], jinja: str | None = None) -> tuple[Path, Tokenizer]:
    """A folder with a sentencepiece model, these settings, and perhaps a template."""
    folder = write_folder(sentencepiece_model(True), config)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder, open_tokenizer(folder)


def test_where_templates_come_from() -> None:
    folder, tokenizer = folder_with(llama_config(chat_template="{{ 1 }}"), jinja="{{ 2 }}")
    template = open_template(folder, tokenizer)
    assert (template.source, template.origin) == ("{{ 2 }}", str(folder / "chat_template.jinja"))
    assert template.special_names == tokenizer.special_names
    folder, tokenizer = folder_with(llama_config(chat_template="{{ 1 }}"))
    template = open_template(folder, tokenizer)
    assert (template.source, template.origin) == ("{{ 1 }}", f"{folder / 'tokenizer_config.json'} chat_template")
    named = [{"name": "tool_use", "template": "{{ 3 }}"}, {"name": "default", "template": "{{ 4 }}"}]
    folder, tokenizer = folder_with(llama_config(chat_template=named))
    assert open_template(folder, tokenizer).source == "{{ 4 }}"
    folder, tokenizer = folder_with(llama_config())
    assert open_template(folder, tokenizer).origin == "built-in ChatML template"
    folder, tokenizer = folder_with({})
    assert open_template(folder, tokenizer).origin == "built-in plain template"


def test_built_in_templates() -> None:
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    _, chatml = opened("llama", "chatml")
    start = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert render(chatml, messages[:2], add_generation_prompt=True) == start
    assert render(chatml, messages, add_generation_prompt=False) == f"{start}a<|im_end|>\n"
    _, plain = opened("llama", "plain")
    start = "<s>s\n\n### Instruction:\nu\n\n### Response:\n"
    assert render(plain, messages[:2], add_generation_prompt=True) == start
    assert render(plain, messages, add_generation_prompt=False) == f"{start}a</s>\n\n"
    with pytest.raises(InputError, match="role tool, expected system, user or assistant"):
        render(plain, [{"role": "tool", "content": "x"}], add_generation_prompt=False)


def test_unusable_templates_are_refused() -> None:
    folder, tokenizer = folder_with(llama_config(chat_template=[{"name": "rag", "template": "{{ 1 }}"}]))
    with pytest.raises(
        InputError,
        match=r"chat_template is a list of \['rag'\], expected .* one called default; write it",
    ):
        open_template(folder, tokenizer)
    folder, tokenizer = folder_with({"eos_token": None})
    with pytest.raises(InputError, match="has no chat template and its tokenizer no eos_token, expected one that ends a turn"):
        open_template(folder, tokenizer)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template.jinja is not UTF-8 .*, expected a Jinja template; fetch"):
        open_template(folder, tokenizer)
