"""Chat templates: Jinja that comes with a model folder, run in a sandbox with bounded loops."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minitune.errors import InputError, nearest

Message = Mapping[str, Any]  # role and content, and whatever else the template knows, e.g. tool_calls
Tool = Mapping[str, Any]  # a function that may be called, as a JSON schema

MAX_ITERATIONS = 200_000  # loop steps and calls of one rendering
MAX_CHARS = 50_000_000  # of one rendering
BUDGET, MARKED = "loop budget", "marks wanted"  # names that no template can spell
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what {% generation %} wrote, where asked for: characters that Unicode has for own uses
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # what every template is given
DOUBTS = ("defined", "undefined", "default", "d")  # tests and filters for names that may be undefined
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which data sets keep what was thought before an answer


class Template(NamedTuple):
    """A chat template: Jinja source, the special tokens that it sees by name, and where it comes from.

    marks: it says by {% generation %} what is trained. tool_use: the template in its place where a conversation has tools.
    asks: names of what else it may be told, such as enable_thinking. options: what it is told of these.
    """

    source: str
    special_names: Mapping[str, str]
    origin: str
    compiled: jinja2.Template
    marks: bool = False
    tool_use: "Template | None" = None
    asks: frozenset[str] = frozenset()
    options: Mapping[str, Any] = MappingProxyType({})


def compile_template(source: str, special_names: Mapping[str, str], origin: str) -> Template:
    """A template that can't run code: sandboxed Jinja whose loops are counted; InputError for a syntax error."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    env.filters |= {"tojson": _tojson, "counted": _counted, MARKED: _marked}
    env.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace, "dict": _dict}
    del env.globals["lipsum"]
    try:
        tree = env.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("a recursive loop can't be counted", loop.lineno)
            loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(env)
        marks = any(node.name == MARKED for node in tree.find_all(jinja2.nodes.Filter))
        asks = _asked(tree) - {*GIVEN, *special_names, *env.globals}
        return Template(source, special_names, origin, env.from_string(tree), marks, asks=asks)
    except (jinja2.TemplateSyntaxError, RecursionError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"chat: {origin}{line} {error}, expected a Jinja chat template; correct it") from None


def with_options(template: Template, options: Mapping[str, Any], where: str) -> Template:
    """The template told these options too, in the place of those that it was told before; InputError for one that it does not
    ask for, which would be lost without a word."""
    asks = sorted(template.asks | (template.tool_use.asks if template.tool_use is not None else frozenset()))
    for name in options:
        if name not in asks:
            raise InputError(
                f"chat: {where} chat_template_kwargs has {name!r}, expected what {template.origin} asks for: "
                f"{', '.join(asks) or 'nothing'}{nearest(name, asks)}"
            )
    return template._replace(options={**template.options, **options})


def render(
    template: Template,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Tool] = (),
    marked: bool = False,
) -> str:
    """The text of a conversation; InputError names the template if it refuses the messages or breaks its bounds.

    marked: OPEN and CLOSE stand around what the template wrote inside {% generation %}.
    """
    options = template.options
    if tools and template.tool_use is not None:
        template = template.tool_use
    names = {**template.special_names, **options, BUDGET: iter(range(MAX_ITERATIONS)), MARKED: marked}
    values = {"tools": list(tools) or None, "documents": None, "add_generation_prompt": add_generation_prompt}
    parts, size = [], 0
    try:
        for part in template.compiled.generate(**names, **values, messages=[_with_reasoning(message) for message in messages]):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise SecurityError(f"more than {MAX_CHARS} characters")
    except Exception as error:  # a template raises whatever Python does, and all of it is in what the user pointed at
        raise InputError(
            f"chat: {template.origin} fails with {type(error).__name__}: {error}, expected it to render "
            f"{told(messages)}; change the template or the messages"
        ) from None
    return "".join(parts)


def told(messages: Sequence[Message]) -> str:
    """A conversation in the words of a message: its roles."""
    return f"a conversation of {', '.join(str(message.get('role')) for message in messages) or 'no message'}"


def _asked(tree: jinja2.nodes.Template) -> frozenset[str]:
    """The names that a template reads before it sets them, without its own variables that Jinja can't tell from those: what it
    sets somewhere and nowhere takes for perhaps undefined."""
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx != "load"}
    doubts = [node for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter)) if node.name in DOUBTS]
    doubted = {node.node.name for node in doubts if isinstance(node.node, jinja2.nodes.Name)}
    return frozenset(jinja2.meta.find_undeclared_variables(tree) - (own - doubted))


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under every name that templates read it by, as transformers hands it over."""
    found = [message[name] for name in REASONING if message.get(name) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


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
    """{% generation %} ... {% endgeneration %} renders its body, between marks where those are wanted."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(char: str) -> jinja2.nodes.Node:
            filtered = jinja2.nodes.Filter(jinja2.nodes.Const(char), MARKED, [], [], None, None)
            return jinja2.nodes.Output([filtered]).set_lineno(line)

        return [mark(OPEN), *body, mark(CLOSE)]


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(context)
        yield item


@jinja2.pass_context
def _marked(context: jinja2.runtime.Context, char: str) -> str:
    return char if context[MARKED] else ""


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
