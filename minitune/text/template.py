"""Chat templates: Jinja that comes with a model folder, run in a sandbox with bounded loops."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
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
from minitune.text.bounds import (
    MAX_CHARS,
    MAX_ITERATIONS,
    Concatenations,
    bounded,
    check_call,
    check_operator,
    concatenated,
    n_steps,
    written,
)

# role and content, and whatever else the template reads, such as tool_calls
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # a function that may be called, as a JSON schema

# Names in the template's context with a space, so that no template can spell them.
BUDGET = "loop budget"
GENERATION_FILTER = "generation border"
# Characters around what {% generation %} wrote, where `render` is asked for them: Unicode reserves
# both for internal use.
GENERATION_START = "\ufdd0"
GENERATION_END = "\ufdd1"
# given to every template
BUILTIN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
# Jinja's tests and filters for names that may be undefined
UNDEFINED_TESTS = ("defined", "undefined", "default", "d")
# keys of a message that data sets keep its reasoning under
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class Template(NamedTuple):
    """A chat template: Jinja source, special tokens by the names that it reads them under, and
    where it comes from.

    has_generation_blocks: {% generation %} in it says what is trained.
    tool_use: the template to use in its place for a conversation with tools.
    variables: names of the options that it reads, such as enable_thinking. options: values for some
    of them.
    """

    source: str
    special_names: Mapping[str, str]
    origin: str
    compiled: jinja2.Template
    has_generation_blocks: bool = False
    tool_use: "Template | None" = None
    variables: frozenset[str] = frozenset()
    options: Mapping[str, Any] = MappingProxyType({})


def compile_template(source: str, special_names: Mapping[str, str], origin: str) -> Template:
    """Compile a template that can't run code: sandboxed Jinja whose loops are counted.

    InputError for a syntax error, with its line.
    """
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, finalize=written, extensions=extensions)
    filters = {**env.filters, "tojson": _tojson, "concatenated": concatenated}
    env.filters = {name: bounded(name, function, _spend) for name, function in filters.items()}
    env.filters |= {"counted": _counted, GENERATION_FILTER: _generation_border}
    env.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "namespace": _Namespace,
        "dict": _dict,
    }
    del env.globals["lipsum"]
    try:
        tree = env.parse(source)
        _count_loops(tree)
        tree = Concatenations().visit(tree)
        tree.set_environment(env)
        # Both are read before the tree is compiled, because Jinja folds constants in place.
        has_blocks = any(
            node.name == GENERATION_FILTER for node in tree.find_all(jinja2.nodes.Filter)
        )
        variables = _variables_read(tree) - {*BUILTIN_VARIABLES, *special_names, *env.globals}
        compiled = env.from_string(tree)
    except (jinja2.TemplateSyntaxError, RecursionError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(
            f"chat: {origin}{line} {error}, expected a Jinja chat template; correct it"
        ) from None
    return Template(source, special_names, origin, compiled, has_blocks, variables=variables)


def with_options(template: Template, options: Mapping[str, Any], where: str) -> Template:
    """Template with these options over those that it has.

    InputError for an option that the template does not read: it would have no effect and no
    message.
    """
    variables = template.variables
    if template.tool_use is not None:
        variables = variables | template.tool_use.variables
    known = sorted(variables)
    for name in options:
        if name not in variables:
            raise InputError(
                f"chat: {where} chat_template_kwargs has {name!r}, expected what "
                f"{template.origin} asks for: "
                f"{', '.join(known) or 'nothing'}{nearest(name, known)}"
            )
    return template._replace(options={**template.options, **options})


def render(
    template: Template,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Tool] = (),
    mark_generation: bool = False,
) -> str:
    """Render a conversation as text.

    mark_generation: put GENERATION_START and GENERATION_END around what was written inside {%
    generation %}. InputError names the template if it refuses the messages or exceeds its bounds.
    """
    options = template.options
    if tools and template.tool_use is not None:
        template = template.tool_use
    context = {
        **template.special_names,
        **options,
        BUDGET: iter(range(MAX_ITERATIONS)),
        GENERATION_FILTER: mark_generation,
        "messages": [_with_reasoning(message) for message in messages],
        "tools": list(tools) or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    parts: list[str] = []
    size = 0
    try:
        for part in template.compiled.generate(**context):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise SecurityError(f"more than {MAX_CHARS} characters")
    # a template raises whatever Python does, and all of it is in what the user pointed at
    except Exception as error:
        raise InputError(
            f"chat: {template.origin} fails with {type(error).__name__}: {error}, expected it to "
            "render "
            f"{describe_roles(messages)}; change the template or the messages"
        ) from None
    return "".join(parts)


def describe_roles(messages: Sequence[Message]) -> str:
    """Describe a conversation in an error message, by its roles."""
    roles = [str(message.get("role")) for message in messages]
    return f"a conversation of {', '.join(roles) or 'no message'}"


def _count_loops(tree: jinja2.nodes.Template) -> None:
    """Make every loop of a parsed template spend the budget of its rendering; a recursive one can't
    be counted.
    """
    for loop in tree.find_all(jinja2.nodes.For):
        if loop.recursive:
            raise jinja2.TemplateSyntaxError("a recursive loop can't be counted", loop.lineno)
        loop.iter = jinja2.nodes.Filter(
            loop.iter, "counted", [], [], None, None, lineno=loop.lineno
        )


def _variables_read(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Names that a template reads before it sets them: its options.

    Jinja counts a variable that is set on some paths only among them. Those are left out, unless
    the template tests somewhere whether the name is undefined, as it does for an option with a
    default.
    """
    assigned = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx != "load"}
    tested = set()
    for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter)):
        if node.name in UNDEFINED_TESTS and isinstance(node.node, jinja2.nodes.Name):
            tested.add(node.node.name)
    return frozenset(jinja2.meta.find_undeclared_variables(tree) - (assigned - tested))


def _with_reasoning(message: Message) -> Message:
    """Message with its reasoning under every key that templates read it by, as transformers hands
    it over.
    """
    reasoning = [message[key] for key in REASONING_KEYS if message.get(key) is not None]
    if not reasoning:
        return message
    return {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which bounds calls, powers and repetitions as well."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(context, n_steps(getattr(obj, "__self__", None), *args))
        check_call(obj, args)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        method = super().wrap_str_format(value)
        if method is None:
            return None

        def bounded_format(*args: Any, **kwargs: Any) -> str:
            check_call(value, args)
            return method(*args, **kwargs)

        return bounded_format

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        _spend(context, n_steps(left, right))
        check_operator(operator, left, right)
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
    """{% generation %} ... {% endgeneration %}, which renders its body, between border characters
    where `render` wants them.
    """

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def border(char: str) -> jinja2.nodes.Node:
            # A filter decides at each rendering whether the character is written.
            filtered = jinja2.nodes.Filter(
                jinja2.nodes.Const(char), GENERATION_FILTER, [], [], None, None
            )
            return jinja2.nodes.Output([filtered]).set_lineno(line)

        return [border(GENERATION_START), *body, border(GENERATION_END)]


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(context)
        yield item


@jinja2.pass_context
def _generation_border(context: jinja2.runtime.Context, char: str) -> str:
    return char if context[GENERATION_FILTER] else ""


def _spend(context: jinja2.runtime.Context, n: int = 1) -> None:
    if next(islice(context[BUDGET], n - 1, n), None) is None:
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
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
