"""Rooms of the house: which may import which, what starts without torch, and the picture of them in the README."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "minitune"

GROUND = "errors structs host seeds hardware types tree"  # the nouns that every room may import
BELOW_ALGORITHMS = f"{GROUND} io losses autodiff sharding quant nn optim lora text data models checkpoint"
BELOW_PROGRAMS = f"{BELOW_ALGORITHMS} inference algorithms steps planning interop launch registry trackers"
ROOMS = {  # room -> the rooms that it may import
    "errors": "",
    "structs": "errors",
    "host": "errors",
    "seeds": "errors host",
    "hardware": "errors host seeds",
    "types": "errors host seeds hardware",
    "tree": "errors host seeds hardware types",
    "io": "errors",
    "launch": "errors",
    "trackers": "errors io",
    "losses": "errors structs types",
    "autodiff": GROUND,
    "sharding": f"{GROUND} io autodiff quant",
    "quant": f"{GROUND} autodiff",
    "nn": f"{GROUND} autodiff quant sharding",
    "optim": f"{GROUND} autodiff",
    "lora": f"{GROUND} quant nn sharding",
    "text": f"{GROUND} io",
    "data": f"{GROUND} io text",
    "models": f"{GROUND} io autodiff quant nn sharding",
    "checkpoint": f"{GROUND} io quant text models sharding",
    "inference": f"{GROUND} losses sharding quant nn text models",
    "algorithms": BELOW_ALGORITHMS,
    "steps": f"{BELOW_ALGORITHMS} algorithms",
    "planning": f"{BELOW_ALGORITHMS} algorithms inference",
    "interop": f"{BELOW_ALGORITHMS} inference",
    "registry": "errors io checkpoint trackers",
    "programs": BELOW_PROGRAMS,
    "cli": f"{BELOW_PROGRAMS} programs",
}
ROOMS["__main__"] = f"{ROOMS['cli']} cli __init__"
ROOMS["__init__"] = "errors"
FROM_A_DOOR = {("models/__init__.py", "minitune.checkpoint.hf_folder.load")}  # models.load, whose file lies in a room above
WITHOUT_TORCH = ("minitune.errors", "minitune.io.paths", "minitune.io.atomic", "minitune.registry.hub", "minitune.cli.inspect")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def wrong_imports(path: str, source: str) -> list[str]:
    """Imports of a file, given its path in the package, that its room may not make."""
    room = path.partition("/")[0].removesuffix(".py")
    allowed = {room, *ROOMS[room].split()}
    if path == "models/__init__.py":  # users find `load`, which reads weights, beside `open`
        allowed.add("checkpoint")
    wrong = []
    for line, name in imported(source):
        if name.startswith("."):
            wrong.append(f"{line}: {name} is relative")
        if name.partition(".")[0] != "minitune":
            continue
        other = name.split(".")[1]
        other = other if other in ROOMS else "__init__"
        if other not in allowed and name != "minitune.__version__" and (path, name) not in FROM_A_DOOR:
            wrong.append(f"{line}: {room} imports {name}")
    return wrong


def doors(path: str, source: str) -> list[str]:
    """Names that a file inside the package takes from a door (an `__init__`) in place of the file that defines them."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minitune."):
            folder = ROOT / str(node.module).replace(".", "/")
            for alias in node.names:
                is_module = (folder / f"{alias.name}.py").is_file() or (folder / alias.name).is_dir()
                if folder.is_dir() and not is_module:
                    wrong.append(f"{node.lineno}: {alias.name} from the door {node.module}")
    return [] if path.endswith("__init__.py") else wrong


FILES = {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_file_belongs_to_a_room():
    assert {path.partition("/")[0].removesuffix(".py") for path in FILES} == set(ROOMS)


def test_rooms_import_what_the_table_says():
    assert not [f"minitune/{path}:{line}" for path, source in FILES.items() for line in wrong_imports(path, source)]


def test_a_file_is_imported_and_not_the_door():
    assert not [f"minitune/{path}:{line}" for path, source in FILES.items() for line in doors(path, source)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tree.py", "from minitune.io import paths"),
        ("io/atomic.py", "from minitune.types import Params"),
        ("losses/token.py", "def f():\n    from minitune import steps"),
        ("programs/run.py", "import minitune.cli.chat"),
        ("data/source.py", "from .readers import opened"),
        ("interop/lm_eval.py", "from minitune.programs import log"),
        ("cli/chat.py", "import minitune.__main__"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str):
    assert wrong_imports(path, source)


def test_a_door_is_found():
    assert doors("programs/run.py", "from minitune.models import Model")
    assert not doors("programs/run.py", "from minitune.models.model import Model")


def test_a_door_only_names_what_people_import():
    for path, source in FILES.items():
        if path.endswith("/__init__.py") and source:
            assert len(source.splitlines()) <= 40, path
            assert not [ast.unparse(node) for node in ast.parse(source).body[1:] if not names_something(node)], path


def names_something(node: ast.stmt) -> bool:
    """True for an import, for one that the type checker alone sees, and for a lookup of what would be a circle if imported."""
    is_lookup = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
    return isinstance(node, (ast.ImportFrom, ast.If)) or is_lookup


def imports_at_the_top(path: str, source: str) -> set[str]:
    """Files of the package that Python runs before this one: those that it imports, and the doors on the way to them."""
    package = f"minitune/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    imported = set()
    for name in names:
        parts = name.split(".")
        for n in range(2, len(parts) + 1):
            module = ".".join(parts[:n])
            stem = "/".join(parts[1:n])
            # a package whose file is being imported has begun already
            if not f"{package}.".startswith(f"{module}."):
                imported |= {file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in FILES}
    return imported


def circle(files: dict[str, str]) -> list[str]:
    """Files that import each other in a circle, of a package given as {path: source}; none if any file can come first."""
    graph = {path: imports_at_the_top(path, source) for path, source in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_any_file_can_be_the_first_to_be_imported():
    assert not circle(FILES)


def test_a_circle_through_a_door_is_found():
    door = "models/__init__.py"
    assert circle({**FILES, door: FILES[door] + "\nfrom minitune.checkpoint.hf_folder import load as load"})


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_it_starts_without_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def picture() -> str:
    """The table as it stands in the README."""
    rows = []
    for room, allowed in ROOMS.items():
        folder = (PACKAGE / room).is_dir()
        words = (
            allowed.replace(BELOW_PROGRAMS, "all above")
            .replace(BELOW_ALGORITHMS, "checkpoint and all above it")
            .replace(GROUND, "ground")
        )
        rows.append(f"{room + '/' if folder else room:12} {words}".rstrip())
    return "\n".join(rows)


def test_the_picture_in_the_readme_is_the_table():
    block = re.search(r"```rooms\n(.*?)\n```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None, "README.md holds no block ```rooms"
    assert block[1] == picture()
