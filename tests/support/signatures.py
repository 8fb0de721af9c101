"""Checks the types and shapes that minitune's functions are given and return, for every function of a module or a class."""

import ast
import functools
import random
import sys
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from jaxtyping import TypeCheckError, _import_hook, install_import_hook, jaxtyped

# beartype looks at one random item of a container. With Python's global generator it would change the state that a test
# or hypothesis relies on, in whatever thread the checked function runs.
codemain.getrandbits = random.Random(0).getrandbits

WITH_TYPE_ERRORS = BeartypeConf(violation_type=TypeCheckError)  # a TypeError, as a caller would expect of Python


def check(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
    """Return the function with its arguments and its result checked, where a size has one value in all of them."""
    has_argument_as_size = any("{" in str(hint) for hint in function.__annotations__.values())
    if has_argument_as_size:
        checked = jaxtyped(function, typechecker=beartype(conf=WITH_TYPE_ERRORS))
    else:
        checked = beartype(function, conf=WITH_TYPE_ERRORS)

    @functools.wraps(function)
    def with_sizes(*args: object, **kwargs: object) -> object:
        __tracebackhide__ = True
        if is_exporting():
            return function(*args, **kwargs)
        if has_argument_as_size:
            return checked(*args, **kwargs)
        with jaxtyped("context"):
            return checked(*args, **kwargs)

    return with_sizes


def is_exporting() -> bool:
    """True while torch.export traces, which has symbols where a signature has sizes."""
    torch = sys.modules.get("torch")
    compiler = getattr(torch, "compiler", None)  # absent while torch itself is imported
    return compiler is not None and compiler.is_exporting()


class OuterFunctions(_import_hook.JaxtypingTransformer):
    """The import hook's rewriting of a module, which decorates the functions of the module and of its classes with `check`.

    A function inside of a function is left out: it is made anew at each call of the outer one, and making its check takes 2 ms.
    The hook's own decorator looks at the arguments twice and binds them by name, which takes 60 microseconds a call.
    Together these two were three quarters of the time of the whole suite.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802  (the name is ast's)
        """Return the function with its check as the innermost decorator, and with its body as it was."""
        lookup = ast.parse(f"jaxtyping._import_hook.Typechecker.lookup[{self._typechecker.get_hash()!r}]", mode="eval").body
        for part in ast.walk(lookup):
            ast.copy_location(part, node)
        node.decorator_list.append(lookup)
        return node


def install() -> None:
    """Check every function of minitune from here on; the package must not be imported yet."""
    _import_hook.JaxtypingTransformer = OuterFunctions
    install_import_hook("minitune", "support.signatures.check")
