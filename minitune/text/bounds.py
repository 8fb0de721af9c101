"""Bounds on what a chat template may make: sizes are looked at before the memory is taken.

Each operation spends some of its rendering's budget, more of it for large operands, so that time is
bounded too. Nothing is computed when a template is compiled, where no budget would count.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

MAX_ITERATIONS = 200_000  # loop steps, calls and filters of one rendering
MAX_CHARS = 20_000_000  # of a text
MAX_ITEMS = 1_000_000  # of a list
MAX_WIDTH = 10_000  # of a field, an indent or another number that a text is made as long as
CHARS_PER_STEP = 1_000  # characters or items whose copying counts as one step
# Widths in patterns of % and format that make a field long, or that come as an argument.
WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{5,}|\*)")
FORMAT_WIDTH = re.compile(r"[:.][^}]*(?:[0-9]{5,}|\{)")
# Filters and methods of texts with a number that their result is made as long as.
WIDTH_FILTERS = ("batch", "center", "indent", "slice", "tojson", "wordwrap")
WRITING_FILTERS = ("format", "join", "pprint", "string", "tojson", "urlencode")
WIDTH_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill")


def size_of(value: Any) -> int:
    """Number of characters or items, 0 for a value without them."""
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def n_steps(*values: Any) -> int:
    """Steps that an operation on these values takes."""
    return 1 + sum(size_of(value) for value in values) // CHARS_PER_STEP


def n_chars(value: Any) -> int:
    """Number of characters in all texts of a JSON value; counting ends beyond MAX_CHARS."""
    if isinstance(value, str):
        return len(value)
    children: Iterable[Any] = ()
    if isinstance(value, dict):
        children = [*value, *value.values()]
    elif isinstance(value, (list, tuple)):
        children = value
    n = 1
    for child in children:
        n += n_chars(child)
        if n > MAX_CHARS:
            break
    return n


def written(value: Any) -> Any:
    """Value that a template writes; SecurityError for a list or object with too many characters."""
    if isinstance(value, (list, tuple, dict)):
        check_size("", n_chars(value))
    return value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """SecurityError for an operation whose result would be too large."""
    sizes = [size_of(value) for value in (left, right)]
    if operator == "**":
        raise SecurityError(f"{operator} on large operands")
    if operator == "+":
        check_size(left, sum(sizes))
    if operator == "*":
        factors = [size_of(value) or value for value in (left, right)]
        if all(isinstance(factor, (int, float)) for factor in factors):
            sized = left if sizes[0] else right
            check_size(sized, abs(factors[0] * factors[1]))
    if operator == "%" and isinstance(left, str) and WIDE.search(left):
        raise SecurityError("a wide field in a pattern of %")


def check_size(value: Any, size: int | float) -> None:
    """SecurityError if a text or list like this value may not have the size."""
    limit = MAX_ITEMS if isinstance(value, (list, tuple, dict)) else MAX_CHARS
    if size > limit:
        raise SecurityError(f"more than {limit} characters or items")


def check_call(called: Any, args: Sequence[Any]) -> None:
    """SecurityError for a method of a text whose result would be too large."""
    text = getattr(called, "__self__", None)
    if not isinstance(text, str):
        return
    name = getattr(called, "__name__", "")
    if name in WIDTH_METHODS:
        check_numbers(args)
    if name in ("format", "format_map") and FORMAT_WIDTH.search(text):
        raise SecurityError("a wide field in a pattern of format")
    if name == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
        check_size(text, text.count(args[0]) * len(args[1]) + len(text))
    if name == "join" and args:
        check_size(text, len(text) * size_of(args[0]) + n_chars(args[0]))


def check_numbers(values: Sequence[Any]) -> None:
    """SecurityError for a number that a text would be made as long as."""
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values):
        raise SecurityError(f"a width of more than {MAX_WIDTH}")


def check_filter(name: str, args: Sequence[Any]) -> None:
    """SecurityError for a filter whose result would be too large; args: what it filters first."""
    value, *rest = args
    check_size(value, size_of(value))
    if name in WRITING_FILTERS:
        check_size("", n_chars(value))
    if name in WIDTH_FILTERS:
        check_numbers(rest)
    if name == "format" and isinstance(value, str) and WIDE.search(value):
        raise SecurityError("a wide field in a pattern of format")
    if name == "sum" and any(isinstance(arg, (str, list, tuple)) for arg in rest):
        raise SecurityError("a sum of texts or lists")
    if name == "replace" and len(rest) > 1 and isinstance(value, str):
        check_size(value, value.count(str(rest[0])) * len(str(rest[1])) + len(value))
    if name == "join" and rest:
        check_size("", size_of(value) * len(str(rest[0])))
    if name == "indent" and isinstance(value, str) and rest:
        width = len(rest[0]) if isinstance(rest[0], str) else int(rest[0])
        check_size(value, value.count("\n") * width + len(value))


class Concatenations(NodeTransformer):
    """Turns a ~ b into a filter of the list of both, which is bounded as every filter is."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        """Node that takes the place of a concatenation; the method's name is Jinja's."""
        self.generic_visit(node)
        items = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(items, "concatenated", [], [], None, None, lineno=node.lineno)


def concatenated(values: Sequence[Any]) -> str:
    """Text of the values one after the other, as ~ writes it."""
    texts = [str(written(value)) for value in values]
    check_size("", sum(map(len, texts)))
    return "".join(texts)


def bounded(
    name: str,
    function: Callable[..., Any],
    spend: Callable[[Any, int], None],
) -> Callable[..., Any]:
    """Filter that spends the budget and looks at sizes before it calls the function.

    Jinja gives some filters the context, its settings or the environment before their arguments.
    """
    wants = getattr(function, "jinja_pass_arg", None)
    kind = getattr(wants, "name", None)

    @jinja2.pass_context
    def run(context: Any, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        spend(context, n_steps(*values))
        check_filter(name, values)
        given = {
            "context": context,
            "eval_context": context.eval_ctx,
            "environment": context.environment,
        }
        before = [given[kind]] if kind in given else []
        return function(*before, *args, **kwargs)

    return run
