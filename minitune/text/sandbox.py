"""Sandbox that chat templates run in: Jinja whose loops, calls and sizes are bounded."""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minitune.text.bounds import (
    MAX_ITERATIONS,
    bounded,
    check_call,
    check_operator,
    concatenated,
    n_steps,
    written,
)

# Names in the template's context with a space, so that no template can spell them.
BUDGET = "loop budget"
GENERATION_FILTER = "generation border"
# Characters around what {% generation %} wrote, where `render` is asked for them: Unicode reserves
# both for internal use.
GENERATION_START = "\ufdd0"
GENERATION_END = "\ufdd1"


def sandbox() -> ImmutableSandboxedEnvironment:
    """Environment with the filters and functions that transformers gives a template."""
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
    return env


def count_loops(tree: jinja2.nodes.Template) -> None:
    """Make every loop of a parsed template spend the budget of its rendering; a recursive one can't
    be counted.
    """
    for loop in tree.find_all(jinja2.nodes.For):
        if loop.recursive:
            raise jinja2.TemplateSyntaxError("a recursive loop can't be counted", loop.lineno)
        loop.iter = jinja2.nodes.Filter(
            loop.iter, "counted", [], [], None, None, lineno=loop.lineno
        )


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
