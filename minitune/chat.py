"""Conversations to tokens: one render function for training, evaluation and generation, and the exact training mask.

Templates come from model folders, so they run in a sandbox with bounded loops. Messages come from data files, so what
they say is never read as a special token.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minitune.tokenizer import Tokenizer, json_object, starts
from minitune.types import InputError

Message = Mapping[str, Any]  # role and content, and whatever else the template knows, e.g. tool_calls

MAX_ITERATIONS = 200_000  # loop steps and calls of one rendering
MAX_CHARS = 50_000_000  # of one rendering
BUDGET = "loop budget"  # the name of a variable that no template can spell

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- else %}{{ raise_exception('role ' ~ message.role ~ ', expected system, user or assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""


class Template(NamedTuple):
    """A chat template: Jinja source, the special tokens that it sees by name, and where it comes from."""

    source: str
    special_names: Mapping[str, str]
    origin: str
    compiled: jinja2.Template


class Tokens(NamedTuple):
    """Token ids of a conversation, and for each whether it is trained."""

    ids: list[int]
    mask: list[bool]


def open_template(folder: Path, tokenizer: Tokenizer) -> Template:
    """The folder's template, else the built-in ChatML if the tokenizer has its tokens, else a plain built-in one."""
    names, file, config = tokenizer.special_names, folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return compile_template(file.read_text(encoding="utf-8"), names, str(file))
        except UnicodeDecodeError as error:
            raise InputError(f"chat: {file} is not UTF-8 ({error}), expected a Jinja template; fetch the file again") from None
    found = json_object(config).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", named)
    if isinstance(found, str):
        return compile_template(found, names, f"{config} chat_template")
    if found is not None:
        raise InputError(
            f"chat: {config} chat_template is a {type(found).__name__}, expected a string or a list of named strings with "
            "one called default; write the template to chat_template.jinja"
        )
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
        return compile_template(CHATML, names, "built-in ChatML template")
    if tokenizer.eos_id is None:
        raise InputError(
            f"chat: {folder} has no chat template and its tokenizer no eos_token, expected one that ends a turn; "
            "write a chat_template.jinja or name the eos_token in tokenizer_config.json"
        )
    return compile_template(PLAIN, names, "built-in plain template")


def compile_template(source: str, special_names: Mapping[str, str], origin: str) -> Template:
    """A template that can't run code: sandboxed Jinja whose loops are counted; InputError for a syntax error."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    env.filters |= {"tojson": _tojson, "counted": _counted}
    env.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace, "dict": _dict}
    del env.globals["lipsum"]
    try:
        tree = env.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("a recursive loop can't be counted", loop.lineno)
            loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(env)
        return Template(source, special_names, origin, env.from_string(tree))
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"chat: {origin}{line} {error}, expected a Jinja chat template; correct it") from None


def render(template: Template, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The text of a conversation; InputError names the template if it refuses the messages or breaks its bounds."""
    names = {**template.special_names, BUDGET: iter(range(MAX_ITERATIONS))}
    values = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    parts, size = [], 0
    try:
        for part in template.compiled.generate(**names, **values):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise SecurityError(f"more than {MAX_CHARS} characters")
    except Exception as error:  # a template raises whatever Python does, and all of it is in what the user pointed at
        raise InputError(
            f"chat: {template.origin} fails with {type(error).__name__}: {error}, expected it to render "
            f"{_roles(messages)}; change the template or the messages"
        ) from None
    return "".join(parts)


def encode_chat(tokenizer: Tokenizer, template: Template, messages: Sequence[Message]) -> Tokens:
    """Ids of a conversation, every assistant turn trained, its end-of-turn token included.

    InputError if the template writes an assistant turn differently from what its generation prompt promised, or
    ends it with no special token.
    """
    return _encode(tokenizer, template, messages, add_generation_prompt=False)


def encode_prompt(tokenizer: Tokenizer, template: Template, messages: Sequence[Message]) -> list[int]:
    """Ids that generation starts from: the conversation and the opening of an assistant turn."""
    return _encode(tokenizer, template, messages, add_generation_prompt=True).ids


def _encode(tokenizer: Tokenizer, template: Template, messages: Sequence[Message], *, add_generation_prompt: bool) -> Tokens:
    shielded, restore = _shield(messages, tokenizer)
    text = render(template, shielded, add_generation_prompt=add_generation_prompt)
    if restore and render(template, messages, add_generation_prompt=add_generation_prompt) != text.translate(restore):
        raise InputError(
            f"chat: {template.origin} reads a special token in the text of a message, expected it to be copied as text; "
            f"remove the special tokens from the content of {_roles(messages)}"
        )
    # The text is cut where a trained span starts, as generation cuts it, and where it ends.
    spans = list(_trained_spans(tokenizer, template, shielded, text))
    borders = [0, *(border for span in spans for border in span), len(text)]
    ids, mask = [], []
    for n, (start, end) in enumerate(pairwise(borders)):
        stretch = tokenizer.encode_stretch(text[start:end], opens=start == 0, restore=restore)
        ids += stretch
        mask += [n % 2 == 1] * len(stretch)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return Tokens([tokenizer.bos_id, *ids], [False, *mask])
    return Tokens(ids, mask)


def _trained_spans(tokenizer: Tokenizer, template: Template, messages: list[Message], text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every assistant turn: from the end of its prompt to the end of the last special token of the turn.

    What a turn itself wrote is what all continuations share: another turn, an opened one, and none.
    """
    last = 0
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt = render(template, messages[:i], add_generation_prompt=True)
        turns = [render(template, messages[: i + 1], add_generation_prompt=opened) for opened in (True, False)]
        if len(prompt) < last or not all(whole.startswith(prompt) for whole in (text, *turns)):
            raise InputError(
                f"chat: {template.origin} doesn't render message {i + 1} (assistant) after its generation prompt, expected "
                "the prompt to be a prefix of the conversation; correct the template or split the conversation there"
            )
        end = None
        for match in tokenizer.find_special.finditer(text, len(prompt)):
            if not all(turn.startswith(text[: match.end()]) for turn in turns):
                break
            end = match.end()
        if end is None:
            raise InputError(
                f"chat: {template.origin} writes no special token after message {i + 1} (assistant), expected one that "
                "ends the turn, or generation never stops; let the template write {{ eos_token }} there"
            )
        last = end
        yield len(prompt), last


def _shield(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[Message], dict[int, str]]:
    """The messages with stand-ins (U+100000 and up) in what could read as a special token, and the table that restores them."""
    stand_ins: dict[str, str] = {}
    shielded = [_shield_strings(message, tokenizer, stand_ins) for message in messages]
    return shielded, {ord(stand_in): char for char, stand_in in stand_ins.items()}


def _shield_strings(value: Any, tokenizer: Tokenizer, stand_ins: dict[str, str]) -> Any:
    """value with a stand-in for the first character of each special token, in any letter case, and of the beginning of one
    at the end of a string, which the text that comes next might complete; stand_ins gets those that it lacks."""
    if isinstance(value, Mapping):
        names = {key: _shield_strings(key, tokenizer, stand_ins) if tokenizer.find_special.search(key) else key for key in value}
        return {names[key]: _shield_strings(child, tokenizer, stand_ins) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shield_strings(child, tokenizer, stand_ins) for child in value]
    if not isinstance(value, str):
        return value
    places = set(starts(tokenizer.find_lookalike, value))
    end = len(value.rstrip())
    tails = range(max(0, end - max(map(len, tokenizer.special), default=0) + 1), end)
    markup = [token for token in tokenizer.special if not token[0].isalnum()]
    places |= {i for i in tails if any(token.startswith(value[i:end]) for token in markup)}
    for char in sorted({value[i] for i in places}):
        stand_ins.setdefault(char, chr(0x100000 + len(stand_ins)))
    return "".join(stand_ins[char] if i in places else char for i, char in enumerate(value)) if places else value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with calls, powers and repetitions bounded as well."""

    intercepted_binops = frozenset({"*", "**"})

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(context)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right)]
        if operator == "**" or abs(sizes[0] * sizes[1]) > MAX_CHARS:
            raise SecurityError(f"{operator} on large operands")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """Jinja's namespace without the underscore names that Python itself would look up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_underscore(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} renders its body: which tokens are trained is found without it."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(context)
        yield item


def _spend(context: jinja2.runtime.Context) -> None:
    if next(context[BUDGET], None) is None:
        raise SecurityError(f"more than {MAX_ITERATIONS} loop steps and calls")


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"{name!r} in a namespace")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _roles(messages: Sequence[Message]) -> str:
    return f"a conversation of {', '.join(str(message.get('role')) for message in messages) or 'no message'}"
