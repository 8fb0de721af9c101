"""Names of minitune that a page's snippets use."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def names_in(page: str) -> dict[str, Any]:
    """{dotted name: object} of all that the Python snippets of a page import from minitune, or take from a module of it."""
    found: dict[str, Any] = {}
    modules: dict[str, ModuleType] = {}
    for snippet in re.findall(r"```python[^\n]*\n(.*?)```", page, re.S):
        syntax = ast.parse(snippet)
        for node in ast.walk(syntax):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "minitune":
                for alias in node.names:
                    thing = _attribute(str(node.module), alias.name)
                    if isinstance(thing, ModuleType):
                        modules[alias.asname or alias.name] = thing
                    else:
                        found[f"{node.module}.{alias.name}"] = thing
        for node in ast.walk(syntax):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                module = modules[node.value.id]
                found[f"{module.__name__}.{node.attr}"] = getattr(module, node.attr)
    return found


def functions_of(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, function) of a function, or of a class and its public methods that minitune defines."""
    if not callable(thing):
        return
    yield name, thing
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{method}", function


def _attribute(module: str, name: str) -> Any:
    owner = importlib.import_module(module)
    return getattr(owner, name) if hasattr(owner, name) else importlib.import_module(f"{module}.{name}")
