"""Chat templates: Jinja that comes with a model folder, run in a sandbox with bounded loops."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.exceptions import SecurityError

from minitune.errors import InputError, nearest
from minitune.text.bounds import MAX_CHARS, MAX_ITERATIONS, Concatenations
from minitune.text.sandbox import BUDGET, GENERATION_FILTER, count_loops, sandbox

# role and content, and whatever else the template reads, such as tool_calls
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # a function that may be called, as a JSON schema

# given to every template
BUILTIN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
# Jinja's tests and filters for names that may be undefined
UNDEFINED_TESTS = ("defined", "undefined", "default", "d")
# keys of a message that data sets keep its reasoning under
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class Template(NamedTuple):
    """Chat template: Jinja source, special tokens by the names that it reads them under, and
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
    env = sandbox()
    try:
        tree = env.parse(source)
        count_loops(tree)
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
                f"{template.origin} asks for: {', '.join(known) or 'nothing'}{nearest(name, known)}"
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
    try:
        return _bounded_text(template.compiled.generate(**context))
    # a template raises whatever Python does, and all of it is in what the user pointed at
    except Exception as error:
        raise InputError(
            f"chat: {template.origin} fails with {type(error).__name__}: {error}, expected it to "
            f"render {describe_roles(messages)}; change the template or the messages"
        ) from None


def _bounded_text(parts: Iterable[str]) -> str:
    """Parts as one text; SecurityError as soon as it is too long."""
    kept: list[str] = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > MAX_CHARS:
            raise SecurityError(f"more than {MAX_CHARS} characters")
    return "".join(kept)


def describe_roles(messages: Sequence[Message]) -> str:
    """Describe a conversation in an error message, by its roles."""
    roles = [str(message.get("role")) for message in messages]
    return f"a conversation of {', '.join(roles) or 'no message'}"


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
