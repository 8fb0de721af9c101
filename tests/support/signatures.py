"""Checks the types and shapes that minitune's functions are given and return, for every function of a module or a class."""

import ast
import functools
import random
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from jaxtyping import TypeCheckError, _import_hook, install_import_hook, jaxtyped
from jaxtyping._storage import pop_shape_memo, push_shape_memo

# beartype looks at one random item of a container. With Python's global generator it would change the state that a test
# or hypothesis relies on, in whatever thread the checked function runs.
codemain.getrandbits = random.Random(0).getrandbits

# A loop of training calls the same functions thousands of times with the same types: a test checks so many calls of each.
CALLS = 100
WITH_TYPE_ERRORS = BeartypeConf(violation_type=TypeCheckError)  # a TypeError, as a caller would expect of Python


def check(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
    """Return the function with its arguments and its result checked, where a size has one value in all of them."""
    hints, calls = function.__annotations__.values(), Calls()
    if any("{" in str(hint) for hint in hints):
        checked = jaxtyped(function, typechecker=beartype(conf=WITH_TYPE_ERRORS))
    else:
        checked = beartype(function, conf=WITH_TYPE_ERRORS)

    @functools.wraps(function)
    def with_names(*args: object, **kwargs: object) -> object:
        __tracebackhide__ = True
        return checked(*args, **kwargs) if calls.are_checked() else function(*args, **kwargs)

    @functools.wraps(function)
    def with_sizes(*args: object, **kwargs: object) -> object:
        __tracebackhide__ = True
        if not calls.are_checked():
            return function(*args, **kwargs)
        push_shape_memo({})
        try:
            return checked(*args, **kwargs)
        finally:
            pop_shape_memo()

    # sizes of their own take half of the time of a check, and most functions speak of none
    return with_sizes if any(may_hold_sizes(hint) for hint in hints) else with_names


class Calls:
    """Number of the calls of one function in a test."""

    test = 0  # number of the test that runs, for the calls of every function

    def __init__(self) -> None:
        self.counted, self.n = 0, 0

    def are_checked(self) -> bool:
        """Count a call; True if its arguments are to be checked."""
        if is_traced():  # a graph would be made anew for every number of calls
            return False
        if self.counted != Calls.test:
            self.counted, self.n = Calls.test, 0
        self.n += 1
        return self.n <= CALLS


def may_hold_sizes(hint: Any) -> bool:
    """False for a hint that is known to hold no size of an array: a class, or classes put together; True for others."""
    if hint is None or hint is Any or hint is Ellipsis or get_origin(hint) in (Literal, Callable):
        return False
    if get_origin(hint) is Annotated:
        return may_hold_sizes(hint.__origin__)
    if get_args(hint):
        return any(may_hold_sizes(part) for part in get_args(hint))
    return not isinstance(hint, type) or type(hint).__module__.startswith("jaxtyping")


def is_traced() -> bool:
    """True while torch.compile or torch.export traces, which has symbols where a signature has sizes."""
    asks = getattr(sys.modules.get("torch.compiler"), "is_compiling", None)  # absent while torch itself is imported
    return asks is not None and asks()


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
