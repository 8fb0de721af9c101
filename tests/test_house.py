"""The house: who may import whom, how long a file may be, what is never written. A rule is a function of one module's source."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minitune"

INTEROP, DEMO = 3.5, 9.0  # the side rooms: interop lies under the programs, the demo is made by all of them
FLOORS = {
    0.0: "__init__ types tree seeds paths toml arrays tensorfile heap hardware",
    1.0: "grad offload compiled float8 nf4 quant widened ops blockwise flex attention losses optim optim8 advance lora sampling "
    "moe",
    2.0: "models/__init__ models/rope models/decoder models/memory models/spelling models/multimodal models/llama models/mistral "
    "models/ministral3 models/qwen2 models/qwen3 models/gemma models/gemma2 models/gemma3 models/phi3 models/olmo2 models/olmo3 "
    "models/smollm3 models/granite models/experts models/mxfp4 models/mixtral models/qwen2_moe models/qwen3_moe models/olmoe "
    "models/gpt_oss models/llama4 checkpoint vocabulary tokenizer template chat source packing documents data pairs",
    3.0: "objectives balance steps sweep private generate frozen calibrate scoring costs",
    INTEROP: "interop/__init__ interop/peft interop/peft_experts interop/compressed interop/gguf "
    "interop/gguf_blocks interop/gguf_vocab interop/bitsandbytes interop/harness",
    4.0: "world stages/__init__ stages/base stages/feed stages/adapt stages/loop stages/train stages/sweeping "
    "stages/measure stages/write log program report runs talk sample plan folders hub __main__",
    DEMO: "demo/__init__ demo/__main__ demo/orders demo/words demo/texts demo/pairs",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
SAME_FLOOR = {  # module -> what it may import of its own floor; modules of one folder may import each other
    **dict.fromkeys(["types", "toml"], "__init__"),
    **dict.fromkeys(["tree", "paths", "arrays"], "types"),
    "offload": "grad",
    "ops": "grad quant widened",
    "widened": "grad",
    "optim": "optim8",
    "advance": "grad optim optim8",
    "attention": "grad blockwise flex",
    "flex": "grad",
    "moe": "grad ops",
    "float8": "grad",
    "quant": "grad float8 nf4",
    "lora": "ops",
    "checkpoint": "models/__init__ models/multimodal models/mxfp4 tokenizer",
    "tokenizer": "vocabulary",
    "chat": "tokenizer template",
    "documents": "chat",
    "source": "chat",
    "data": "chat template tokenizer documents source packing",
    "pairs": "chat template tokenizer documents data source packing",
    "balance": "objectives",
    "steps": "objectives",
    "private": "objectives steps",
    "frozen": "objectives",
    "costs": "objectives",
    "world": "log",
    **dict.fromkeys(
        [f"stages/{part}" for part in ("base", "feed", "adapt", "loop", "train", "sweeping", "measure", "write")], "world log"
    ),
    "program": "world stages/__init__ log",
    "report": "log",
    "runs": "world log program report",
    "talk": "world stages/base",
    "sample": "program",
    "plan": "program world stages/__init__ stages/sweeping stages/train",
    "hub": "folders",
    "__main__": "world stages/__init__ log program runs talk sample plan folders hub",
}
CORE = {"torch", "safetensors", "sentencepiece", "msgspec", "numpy", "wandb", "jaxtyping", "rich"}
WITH_TORCH = {"jinja2": "template"}  # torch depends on it, so it is there; only this module wants it
EXTRAS = {  # imported in functions of these modules
    "tokenizers": "vocabulary",
    "pyarrow": "source",
    "huggingface_hub": "hub",
    **dict.fromkeys(["lm_eval", "datasets"], "interop/harness"),
}
BUDGET = 400  # lines a file

MUTABLE = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)
DISPLAYS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
BUILDERS = MUTABLE | {"split", "copy"}
PLAIN = {"int", "float", "str", "bool", "len"}
PLAIN_MODULES = {"np", "time", "json", "tomllib", "msgspec"}
WRITES = {"append", "extend", "insert", "update", "setdefault", "pop", "popitem", "clear", "add", "remove", "discard", "sort"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli"}
DONATIONS = {
    ("tree", "donate", "copy_"),
    ("tree", "donate_at", "index_copy_"),
    ("tree", "donate_sum", "add_"),
    ("advance", "donate_adamw", "_fused_adamw_"),
}
RUNS = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def dotted(node: ast.AST | None) -> str:
    """`a.b.c` of a name or an attribute chain, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def scoped(tree: ast.AST, scopes: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node with the classes and functions around it, outermost first."""
    for node in ast.iter_child_nodes(tree):
        yield node, scopes
        inner = isinstance(node, (*DEFS, ast.ClassDef, ast.Lambda))
        yield from scoped(node, (*scopes, node) if inner else scopes)


def imports(module: str, source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether at the top of the file) of every import, in functions too."""
    for node, scopes in scoped(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, not scopes) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name, not scopes) for name in names)


def house_module(name: str) -> str:
    """The module of the house that a dotted import reaches: minitune.models.llama.Config is models/llama."""
    path = name.removeprefix("minitune").lstrip(".").replace(".", "/")
    while path:
        if path in FLOOR or f"{path}/__init__" in FLOOR:
            return path if path in FLOOR else f"{path}/__init__"
        path = path.rpartition("/")[0]
    return "__init__"


def imports_go_down(module: str, source: str) -> list[str]:
    """A module imports from floors below and what SAME_FLOOR lists; only stages and world import interop, nobody the demo."""
    found = [f"{line}: {name} is relative" for line, name, _ in imports(module, source) if name.startswith(".")]
    for line, name, _ in imports(module, source):
        if name.partition(".")[0] != "minitune":
            continue
        target = house_module(name)
        same_folder = "/" in module and target.partition("/")[0] == module.partition("/")[0]
        same_floor = same_folder or target in SAME_FLOOR.get(module, "").split()
        if FLOOR[target] > FLOOR[module] or (FLOOR[target] == FLOOR[module] and not same_floor):
            found.append(f"{line}: imports {target} of floor {FLOOR[target]:g}")
        if FLOOR[target] == INTEROP and not module.startswith(("stages/", "world")) and not same_folder:
            found.append(f"{line}: imports {target}, which only stages and world may")
    return found


def third_party(module: str, source: str) -> list[str]:
    """The core list anywhere; an extra only inside a function of the module that needs it."""
    found = []
    for line, name, top in imports(module, source):
        package = name.partition(".")[0]
        core = package in CORE or module in WITH_TORCH.get(package, "").split()
        if core or package in sys.stdlib_module_names or package in ("minitune", ""):
            continue
        if top or module not in EXTRAS.get(package, "").split():
            found.append(f"{line}: imports {package}{' at the top' if top else ''}")
    return found


def within_budget(module: str, source: str) -> list[str]:
    """No file of 400 lines or more."""
    return [f"{n} lines"] if (n := len(source.splitlines())) >= BUDGET else []


def no_nn_module(module: str, source: str) -> list[str]:
    """No class derives from nn.Module."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [f"{c.lineno}: class {c.name}" for c in classes if any(ast.unparse(b).split(".")[-1] == "Module" for b in c.bases)]


def no_global_state(module: str, source: str) -> list[str]:
    """Modules and classes hold no list, dict or set but UPPER_CASE dicts and Struct defaults; no global, no cache decorator."""
    found = []
    for node, scopes in scoped(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(isinstance(scope, ast.ClassDef) for scope in scopes):
            names = [dotted(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
            constant = isinstance(node.value, ast.Dict) and all(name.isupper() for name in names)
            built = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).split(".")[-1] in BUILDERS
            field = bool(scopes) and any("Struct" in ast.unparse(base) for base in getattr(scopes[-1], "bases", []))
            if (built or isinstance(node.value, DISPLAYS)) and not constant and not field:
                found.append(f"{node.lineno}: {', '.join(names)}")
        elif isinstance(node, ast.Global):
            found.append(f"{node.lineno}: global {', '.join(node.names)}")
        elif isinstance(node, DEFS):
            cached = any(re.search(r"\b(lru_)?cache\b", ast.unparse(decorator)) for decorator in node.decorator_list)
            found += [f"{node.lineno}: {node.name} is cached"] * cached
    return found


def tables_are_constant(module: str, source: str) -> list[str]:
    """Nothing writes to an UPPER_CASE table."""
    found = []
    for node in ast.walk(ast.parse(source)):
        written = None
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written = node.value
        elif isinstance(node, ast.AugAssign):
            written = node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            written = node.func.value
        if re.fullmatch(r"[A-Z][A-Z0-9_]+", dotted(written).split(".")[-1]):
            found.append(f"{getattr(node, 'lineno', 0)}: {dotted(written)} is written")
    return found


def bindings(scope: ast.AST, name: str) -> list[ast.AST | None]:
    """What a scope binds a name to: its annotation, else all its values, with None for what can't be told (loops, unpacking)."""
    annotations, values = [], []
    for node in ast.walk(scope):
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            annotations += [node.annotation] if (node.arg if isinstance(node, ast.arg) else dotted(node.target)) == name else []
        elif isinstance(node, (ast.For, ast.comprehension)):
            values += [None for target in ast.walk(node.target) if dotted(target) == name]
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs: list[tuple[ast.expr, ast.expr | None]] = [(target, node.value)]
                if isinstance(target, ast.Tuple):
                    elements = node.value.elts if isinstance(node.value, ast.Tuple) else [None] * len(target.elts)
                    pairs = list(zip(target.elts, elements, strict=False))
                values += [value for bound, value in pairs if dotted(bound) == name]
    return annotations or values


def layers(value: ast.AST | None) -> tuple[int, bool]:
    """Of a value or an annotation: how many containers deep it is known to be, and whether numbers or strings lie beneath."""
    if isinstance(value, (ast.List, ast.Set, ast.Dict)):
        inner = value.values if isinstance(value, ast.Dict) else value.elts
        return 1, bool(inner) and all(layers(element) == (0, True) for element in inner)
    if isinstance(value, (ast.ListComp, ast.SetComp, ast.DictComp)):
        return 1, layers(value.value if isinstance(value, ast.DictComp) else value.elt) == (0, True)
    if isinstance(value, ast.BinOp):  # [0] * n, 2 * 3, or the annotation int | float
        return layers(value.left) if isinstance(value.left, ast.List) else min(layers(value.left), layers(value.right))
    if isinstance(value, ast.Call) and dotted(value.func).split(".")[0] in PLAIN_MODULES:
        return 9, True
    if isinstance(value, ast.Subscript):
        last = value.slice.elts[-1] if isinstance(value.slice, ast.Tuple) and value.slice.elts else value.slice
        depth, plain = layers(last)
        return (depth + 1, plain) if dotted(value.value) in MUTABLE else (0, False)
    name = dotted(value.func if isinstance(value, ast.Call) else value)
    if name in MUTABLE:
        return 1, name == "Counter"
    literal = isinstance(value, (ast.JoinedStr, ast.Tuple)) or (isinstance(value, ast.Constant) and value.value is not None)
    return 0, literal or name in PLAIN


def no_tensor_writes(module: str, source: str) -> list[str]:
    """No x.f_(), no out=, no item or augmented assignment but to local numbers and containers; the exceptions are DONATIONS."""
    found = []
    has_tensors = any(name.partition(".")[0] == "torch" for _, name, _ in imports(module, source))
    for node, scopes in scoped(ast.parse(source)):
        if isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            inside = [getattr(scope, "name", "") for scope in scopes]
            donates = any((module, name, method) in DONATIONS for name in inside)
            allowed = donates or (module, method) == ("grad", "requires_grad_")
            out = dotted(node.func).split(".")[0] in ("torch", "F") and any(k.arg == "out" for k in node.keywords)
            if out or (re.fullmatch(r".*[a-z0-9]_", method) and not allowed):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        if not has_tensors or not isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            continue
        for target in [node.target] if isinstance(node, ast.AugAssign) else node.targets:
            root, depth = target, 0
            while isinstance(root, ast.Subscript):
                root, depth = root.value, depth + 1
            bad = isinstance(target, ast.Attribute) and target.attr in ("data", "grad", "requires_grad")
            if depth or isinstance(node, ast.AugAssign):
                kind = ast.ClassDef if dotted(root).startswith("self.") else DEFS
                known = [layers(value) for scope in scopes if isinstance(scope, kind) for value in bindings(scope, dotted(root))]
                bad = not known or min(known) < (depth, isinstance(node, ast.AugAssign))
            if bad:
                found.append(f"{node.lineno}: {ast.unparse(target)} is written")
    return found


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, (*DEFS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                inner = ast.Module(body=node.body, type_ignores=[])
                yield from ((f"{node.name}.{name}", child) for name, child in public(inner))


def documented(module: str, source: str) -> list[str]:
    """A docstring on the module and every public name; an annotation on every argument and result of a public function."""
    tree = ast.parse(source)
    found = ["1: no module docstring"] if tree.body and not ast.get_docstring(tree) else []
    for name, node in public(tree):
        if not ast.get_docstring(node):
            found.append(f"{node.lineno}: {name} has no docstring")
        if isinstance(node, ast.ClassDef):
            continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in args if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        found += [f"{node.lineno}: {name}: {arg} has no annotation" for arg in bare + ["result"] * (node.returns is None)]
    return found


def well_named(module: str, source: str) -> list[str]:
    """No get_, make_, utils, helpers, manager or trainer."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (*DEFS, ast.ClassDef))]
    named = [(1, module.split("/")[-1]), *((n.lineno, n.name) for n in nodes)]
    bad = re.compile(r"_*(get_|make_)|.*(utils|helper|manager|trainer)", re.IGNORECASE)
    return [f"{line}: {name}" for line, name in named if bad.match(name)]


def no_leftovers(module: str, source: str) -> list[str]:
    """No print outside log and __main__, no notes to oneself, no postponed annotations: the checks under test need real ones."""
    found = [f"{i}: {m[0]}" for i, line in enumerate(source.splitlines(), 1) if (m := re.search(r"\b(TODO|FIXME|XXX)\b", line))]
    found += [f"{line}: {name}" for line, name, _ in imports(module, source) if name == "__future__.annotations"]
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return found + [f"{c.lineno}: print" for c in calls if dotted(c.func) == "print" and module not in ("log", "__main__")]


def data_is_not_code(module: str, source: str) -> list[str]:
    """Nothing that runs what a file or a program says: no pickles, no eval or exec, no import by name."""
    found = [f"{line}: {name}" for line, name, _ in imports(module, source) if name.split(".")[0] in {*PICKLES, "importlib"}]
    found = [f for f in found if "importlib.metadata" not in f and "importlib.resources" not in f]
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    found += [f"{c.lineno}: {dotted(c.func)}" for c in calls if dotted(c.func) in RUNS]
    return found + [f"{c.lineno}: allow_pickle" for c in calls if any(k.arg == "allow_pickle" for k in c.keywords)]


def draws_are_seeded(module: str, source: str) -> list[str]:
    """No draw from a global generator, and none of them seeded."""
    found = []
    banned = re.compile(
        r"random\.(?!Random$).*|(np|numpy)\.random\.(?!default_rng$).*|torch\.manual_seed|.*\.(dropout|randn?_like)"
    )
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name = dotted(call.func)
        draws = name.startswith("torch.") and name.removeprefix("torch.") in DRAWS
        if banned.fullmatch(name) or (draws and not any(k.arg == "generator" for k in call.keywords)):
            found.append(f"{call.lineno}: {name}")
    return found


WRITTEN = (  # each writes a tensor, or something that may be one
    *("x[0] = 1", "x += 1", "x.grad = None", "y = x * 2; y += 1", "y = 0.0; y = torch.zeros(3); y += 1", "self.m[0] = 1"),
    *("sums = {}; sums['a'] += x", "params['a'] += x", "params['a'][0] = 1", "for y in params.values(): y *= 2"),
)
Rule = Callable[[str, str], list[str]]
RULES: dict[Rule, list[tuple[str, str]]] = {  # each with the violations that it must find: (module, source)
    imports_go_down: [
        ("tree", "from minitune.seeds import derive"),
        ("ops", "def f():\n    from minitune import steps"),
        ("steps", "import minitune.stages"),
        ("log", "from minitune.interop import peft"),
        ("__main__", "import minitune.demo.orders"),
        ("data", "from .chat import render"),
        ("interop/peft", "from minitune import stages"),
        ("losses", "from minitune.optim import AdamW"),
    ],
    third_party: [("data", "import yaml"), ("vocabulary", "import tokenizers"), ("data", "def f():\n    import tokenizers")],
    within_budget: [("ops", "x = 1\n" * BUDGET)],
    no_nn_module: [("ops", "class A(torch.nn.Module): ..."), ("ops", "class A(nn.Module): ..."), ("ops", "class A(Module): ...")],
    no_global_state: [
        ("ops", "cache = {}"),
        ("ops", "seen: list[int] = list()"),
        ("ops", "NAMES = ['a']"),
        ("ops", "NAMES = 'a b'.split()"),
        ("ops", "class A:\n    seen = set()"),
        ("ops", "def f():\n    global n\n    n = 1"),
        ("ops", "@functools.lru_cache(maxsize=1)\ndef f(): ..."),
    ],
    tables_are_constant: [("ops", line) for line in ("TABLE['a'] = 1", "losses.TABLE.update(a=1)", "del A_B['a']", "A_B |= {}")],
    no_tensor_writes: [
        ("tree", "def other(x, y):\n    return x.copy_(y)"),
        ("ops", "def donate_at(x, i, y):\n    return x.index_copy_(0, i, y)"),
        ("ops", "def f(x):\n    torch.add(x, 1, out=x)"),
        *(
            ("ops", "import torch\nclass A:\n  def f(self, x: Tensor, params: dict[str, Tensor]):\n    " + line)
            for line in WRITTEN
        ),
    ],
    documented: [
        ("ops", "x = 1"),
        ("ops", '"""m"""\ndef f() -> int: ...'),
        ("ops", '"""m"""\ndef f(x) -> int:\n    """d"""'),
        ("ops", '"""m"""\nclass A:\n    """d"""\n    def f(self) -> int: ...'),
    ],
    well_named: [("ops", "def get_x(): ..."), ("data_utils", ""), ("ops", "class SftTrainer: ...")],
    no_leftovers: [("ops", "print(1)"), ("ops", "# TO" + "DO: later"), ("ops", "from __future__ import annotations")],
    data_is_not_code: [
        ("ops", "import pickle"),
        ("ops", "torch.load('x')"),
        ("ops", "np.load('x', allow_pickle=True)"),
        ("ops", "def f(x):\n    import importlib\n    return importlib.import_module(x)"),
        ("ops", "eval('1')"),
    ],
    draws_are_seeded: [
        ("ops", "torch.randn(3)"),
        ("ops", "torch.manual_seed(0)"),
        ("ops", "random.random()"),
        ("ops", "np.random.rand(3)"),
    ],
}
CLEAN = '''"""A module that keeps every rule."""
import random
import torch
from minitune import tree
from minitune.types import Batch
TABLE = {"a": 1}
def f(n: int, *names: str) -> dict[str, int]:
    """A docstring."""
    counts, total = {}, 0
    for name in names:
        counts[name] = TABLE[name]
        shards: list[dict[str, torch.Tensor]] = [{}]
        shards[-1][name] = torch.zeros(1)
        total += n
    draws = torch.randn(n, generator=torch.Generator().manual_seed(0)), random.Random(0).random()
    return {**counts, "total": total, "draws": len(draws)}
'''
SOURCES = {str(path.relative_to(PACKAGE).with_suffix("")): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_file_has_a_floor():
    assert sorted(SOURCES) == sorted(FLOOR)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule: Rule):
    found = [
        f"minitune/{module}.py:{line}"
        for module in sorted(SOURCES.keys() & FLOOR.keys())
        for line in rule(module, SOURCES[module])
    ]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "module", "source"), [(r, *planted) for r, violations in RULES.items() for planted in violations]
)
def test_rule_finds_what_it_forbids(rule: Rule, module: str, source: str):
    assert rule(module, source)
    assert not rule("data", CLEAN)
