"""Meaning of the keys of a struct: the comments that stand beside its fields in its source."""

import ast
import inspect
import io
import textwrap
import tokenize

import msgspec


def comments_of(kind: type) -> dict[str, str]:
    """{field: comment} of every field of a struct, a NamedTuple or a TypedDict, on one line each;
    "" for a field without one.

    A comment is the lines of comment right above a field, then what stands at the end of its own
    lines. A field that a struct inherits has that of the struct which defines it. Where the source
    is not there, as in a frozen application, every comment is "".
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base not in (msgspec.Struct, tuple, object):
            written = {name: text for name, text in _written(base).items() if text}
            found = {**found, **written}
    names = kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else kind.__annotations__
    return {name: found.get(name, "") for name in names}


def first_sentence(kind: type) -> str:
    """First sentence of a docstring, on one line; "" without a docstring."""
    paragraph = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    text = " ".join(paragraph.split())
    # A full stop ends a sentence where a capital follows: "et al. 2016" and "eq. 4" go on.
    for n, letter in enumerate(text):
        following = text[n + 1 : n + 3]
        if letter == "." and following[:1] == " " and following[1:].isupper():
            return text[: n + 1]
    return text


def _written(kind: type) -> dict[str, str]:
    """Comments of the fields that a class defines itself."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    own_lines, line_ends = _comments(source)
    definition = ast.parse(source).body[0]
    fields: dict[str, str] = {}
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            above = first
            while above - 1 in own_lines:
                above -= 1
            parts = [own_lines[n] for n in range(above, first)]
            parts += [(own_lines | line_ends).get(n, "") for n in range(first, last + 1)]
            fields[node.target.id] = " ".join(part for part in parts if part)
    return fields


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """{line: comment} of comments that have a line to themselves, and of those behind code."""
    own_lines: dict[int, str] = {}
    line_ends: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            has_own_line = token.line.lstrip().startswith("#")
            text = token.string.lstrip("#").partition("# noqa")[0].strip()
            (own_lines if has_own_line else line_ends)[token.start[0]] = text
    return own_lines, line_ends
