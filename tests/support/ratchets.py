"""Rules whose exceptions may only become fewer, counted file by file, with the table of the exceptions that there are.

    PYTHONPATH=tests python -m support.ratchets            lowers the numbers of tests/house/exceptions.toml to what is there now
    PYTHONPATH=tests python -m support.ratchets --accept   raises them too: for a file that was moved, and for nothing else

A rule is a function of the whole package, {path: source}, that gives {file or name: how many exceptions}.
"""

import ast
import functools
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from support.paths import PACKAGE, ROOT

TABLE = ROOT / "tests/house/exceptions.toml"
FILE_LINES, FUNCTION_LINES = 300, 40

Sources = Mapping[str, str]
Counts = dict[str, int]
Rule = Callable[[Sources], Counts]
Function = ast.FunctionDef | ast.AsyncFunctionDef
FIRST_WORDS = ("What", "Whether", "How", "Where", "The", "A", "An")

parsed = functools.cache(ast.parse)  # every rule reads every file


def by_file(count: Callable[[str], int]) -> Rule:
    """Rule over the package from one that counts in a single source."""

    @functools.wraps(count)
    def rule(sources: Sources) -> Counts:
        counts = {path: count(source) for path, source in sources.items()}
        return {path: n for path, n in counts.items() if n}

    return rule


@by_file
def file_is_short(source: str) -> int:
    """At most 300 lines a file: a longer one holds two ideas. Counts the lines of a file that has more."""
    n = len(source.splitlines())
    return n if n > FILE_LINES else 0


@by_file
def functions_are_short(source: str) -> int:
    """At most 40 lines a function. Counts longer functions."""
    functions = [node for node in ast.walk(parsed(source)) if isinstance(node, Function)]
    return sum((node.end_lineno or node.lineno) - node.lineno >= FUNCTION_LINES for node in functions)


@by_file
def conditionals_are_not_nested(source: str) -> int:
    """No conditional expression inside another: an if statement says it in lines. Counts the inner ones."""
    inner: set[ast.AST] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.IfExp):
            inner |= {child for child in ast.walk(node) if isinstance(child, ast.IfExp) and child is not node}
    return len(inner)


@by_file
def docstrings_say_what_you_get(source: str) -> int:
    """A docstring begins with a verb, or a noun without its article. Counts those that begin with one of FIRST_WORDS."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(parsed(source)) if isinstance(node, kinds)]
    first = [re.split(r"\W", text.strip(), maxsplit=1)[0] for text in docstrings if text]
    return sum(word in FIRST_WORDS for word in first)


def type_names_have_one_meaning(sources: Sources) -> Counts:
    """A public type name is defined once in the package. Counts the files that define it, if there are more.

    A family's Config is meant to be one of many: users write qwen3.Config.
    """
    places: dict[str, set[str]] = defaultdict(set)
    for path, source in sources.items():
        for name in _public_types(parsed(source)):
            if not (name == "Config" and "models/families/" in path):
                places[name].add(path)
    return {name: len(files) for name, files in places.items() if len(files) > 1}


def _public_types(tree: ast.Module) -> Iterator[str]:
    """Names of classes and of type aliases at the top of a file."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp, ast.Name, ast.Attribute)):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name))


def classes_are_abstract_or_final(sources: Sources) -> Counts:
    """No class overrides a method that another class of the package already implements. Counts such methods by file."""
    classes = {node.name: node for source in sources.values() for node in parsed(source).body if isinstance(node, ast.ClassDef)}
    counts: Counts = {}
    for path, source in sources.items():
        nodes = [node for node in parsed(source).body if isinstance(node, ast.ClassDef)]
        n = sum(len(_methods(node) & _inherited(node, classes)) for node in nodes)
        if n:
            counts[path] = n
    return counts


def _methods(node: ast.ClassDef) -> set[str]:
    """Methods that a class implements: those whose body is more than a docstring and an ellipsis."""
    functions = [child for child in node.body if isinstance(child, Function)]
    return {child.name for child in functions if not _is_abstract(child)}


def _is_abstract(node: Function) -> bool:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    says_nothing = all(isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) for child in body)
    raises = len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])
    return says_nothing or raises


def _inherited(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """Methods that the bases of a class implement, as far as they are classes of the package."""
    methods: set[str] = set()
    for base in node.bases:
        name = ast.unparse(base).split(".")[-1]
        if name in classes and name != node.name:
            methods |= _methods(classes[name]) | _inherited(classes[name], classes)
    return methods


RULES: tuple[Rule, ...] = (
    file_is_short,
    functions_are_short,
    conditionals_are_not_nested,
    docstrings_say_what_you_get,
    type_names_have_one_meaning,
    classes_are_abstract_or_final,
)


def package() -> Sources:
    """Sources of the package by their path from the root of the repository."""
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def exceptions() -> dict[str, Counts]:
    """Exceptions that the committed table allows, by rule."""
    return tomllib.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {}


def lowered(allowed: Mapping[str, Counts], sources: Sources, *, accept: bool = False) -> dict[str, Counts]:
    """Table with each number at what is there now, without entries that are no longer needed; accept: with new ones too."""
    table = {}
    for rule in RULES:
        before, now = allowed.get(rule.__name__, {}), rule(sources)
        kept = {key: n if accept else min(n, before[key]) for key, n in now.items() if accept or key in before}
        table[rule.__name__] = kept
    return table


def complaints(rule: Rule, allowed: Counts, sources: Sources) -> list[str]:
    """Entries of a rule that have become worse, and entries of the table that are higher than they need be."""
    now = rule(sources)
    worse = [f"{key}: {n}, allowed {allowed.get(key, 0)}" for key, n in now.items() if n > allowed.get(key, 0)]
    slack = [f"{key}: {now.get(key, 0)} now, lower the {n} in {TABLE.name}" for key, n in allowed.items() if n > now.get(key, 0)]
    return worse + slack


def written(table: Mapping[str, Counts]) -> str:
    """Table as TOML, in the order of the rules and of the names."""
    parts = ["# Exceptions to the rules of tests/support/ratchets.py, which also lowers them."]
    for name, entries in table.items():
        parts += ["", f"[{name}]", *(f'"{key}" = {n}' for key, n in sorted(entries.items()))]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TABLE.write_text(written(lowered(exceptions(), package(), accept="--accept" in sys.argv)), encoding="utf-8")
