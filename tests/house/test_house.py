"""Rules without exceptions: what is imported, and what is never written. A rule is a function of one module's source."""

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator

import pytest

from support.paths import PACKAGE, ROOT, TESTS

pytestmark = pytest.mark.fast

CORE = {"torch", "safetensors", "sentencepiece", "msgspec", "numpy", "wandb", "jaxtyping", "rich", "typing_extensions"}
WITH_TORCH = {
    "jinja2": "text/template text/sandbox text/bounds",
    "filelock": "io/locks",
}  # torch depends on them; only these modules import them
EXTRAS = {  # imported in functions of these modules
    "tokenizers": "text/open_vocabulary text/tokenizer_json text/vocabulary text/sentencepiece text/ranks",
    "pyarrow": "data/files data/tables",
    "huggingface_hub": "registry/hub registry/hub_data registry/hub_errors registry/hub_models registry/hub_upload",
    "mlflow": "trackers/mlflow registry/mlflow_models",
    "azure": "registry/azure_models",
    "trackio": "trackers/trackio",
    "onnx": "interop/artefacts",
    "onnxscript": "interop/onnx",
    "onnxruntime": "interop/readers/onnxruntime",
    "executorch": "interop/executorch interop/readers/executorch",
    "torchao": "interop/executorch",
    "pytorch_tokenizers": "interop/executorch_tokenizer",
    **dict.fromkeys(["transformers", "peft"], "interop/readers/hugging_face"),
    "gguf": "interop/artefacts",
    **dict.fromkeys(["lm_eval", "datasets"], "interop/lm_eval interop/lm_eval_tasks interop/lm_eval_data interop/lm_eval_index"),
}

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
    ("optim/adamw", "donate_adamw", "_fused_adamw_"),
    ("sharding/passing", "copied", "copy_"),
    ("sharding/passing", "joined", "out"),
}
RUNS = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


parsed = functools.cache(ast.parse)  # every rule reads every file


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
    for node, scopes in scoped(parsed(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, not scopes) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name, not scopes) for name in names)


def third_party(module: str, source: str) -> list[str]:
    """The core list anywhere; an extra only inside a function of the module that needs it."""
    faults = []
    for line, name, top in imports(module, source):
        package = name.partition(".")[0]
        core = package in CORE or module in WITH_TORCH.get(package, "").split()
        if core or package in sys.stdlib_module_names or package in ("minitune", ""):
            continue
        if top or module not in EXTRAS.get(package, "").split():
            faults.append(f"{line}: imports {package}{' at the top' if top else ''}")
    return faults


def no_nn_module(module: str, source: str) -> list[str]:
    """No class derives from nn.Module."""
    classes = [node for node in ast.walk(parsed(source)) if isinstance(node, ast.ClassDef)]
    return [f"{c.lineno}: class {c.name}" for c in classes if any(ast.unparse(b).split(".")[-1] == "Module" for b in c.bases)]


def no_global_state(module: str, source: str) -> list[str]:
    """Modules and classes hold no list, dict or set but UPPER_CASE dicts and Struct defaults; no global, no cache decorator."""
    faults = []
    for node, scopes in scoped(parsed(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(isinstance(scope, ast.ClassDef) for scope in scopes):
            names = [dotted(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
            constant = isinstance(node.value, ast.Dict) and all(name.isupper() for name in names)
            built = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).split(".")[-1] in BUILDERS
            field = bool(scopes) and any("Struct" in ast.unparse(base) for base in getattr(scopes[-1], "bases", []))
            if (built or isinstance(node.value, DISPLAYS)) and not constant and not field:
                faults.append(f"{node.lineno}: {', '.join(names)}")
        elif isinstance(node, ast.Global):
            faults.append(f"{node.lineno}: global {', '.join(node.names)}")
        elif isinstance(node, DEFS):
            cached = any(re.search(r"\b(lru_)?cache\b", ast.unparse(decorator)) for decorator in node.decorator_list)
            faults += [f"{node.lineno}: {node.name} is cached"] * cached
    return faults


def tables_are_constant(module: str, source: str) -> list[str]:
    """Nothing writes to an UPPER_CASE table."""
    faults = []
    for node in ast.walk(parsed(source)):
        written = None
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written = node.value
        elif isinstance(node, ast.AugAssign):
            written = node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            written = node.func.value
        if re.fullmatch(r"[A-Z][A-Z0-9_]+", dotted(written).split(".")[-1]):
            faults.append(f"{getattr(node, 'lineno', 0)}: {dotted(written)} is written")
    return faults


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
    faults = []
    has_tensors = any(name.partition(".")[0] == "torch" for _, name, _ in imports(module, source))
    for node, scopes in scoped(parsed(source)):
        if isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            inside = [getattr(scope, "name", "") for scope in scopes]
            donates = any((module, name, method) in DONATIONS for name in inside)
            allowed = donates or (module, method) == ("autodiff/value_and_grad", "requires_grad_")
            out = dotted(node.func).split(".")[0] in ("torch", "F") and any(k.arg == "out" for k in node.keywords)
            out = out and not any((module, name, "out") in DONATIONS for name in inside)
            if out or (re.fullmatch(r".*[a-z0-9]_", method) and not allowed):
                faults.append(f"{node.lineno}: {ast.unparse(node)}")
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
                faults.append(f"{node.lineno}: {ast.unparse(target)} is written")
    return faults


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
    tree = parsed(source)
    faults = ["1: no module docstring"] if tree.body and not ast.get_docstring(tree) else []
    for name, node in public(tree):
        if not ast.get_docstring(node):
            faults.append(f"{node.lineno}: {name} has no docstring")
        if isinstance(node, ast.ClassDef):
            continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in args if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        faults += [f"{node.lineno}: {name}: {arg} has no annotation" for arg in bare + ["result"] * (node.returns is None)]
    return faults


def well_named(module: str, source: str) -> list[str]:
    """No get_, make_, utils, helpers, manager or trainer."""
    nodes = [n for n in ast.walk(parsed(source)) if isinstance(n, (*DEFS, ast.ClassDef))]
    named = [(1, module.split("/")[-1]), *((n.lineno, n.name) for n in nodes)]
    bad = re.compile(r"_*(get_|make_)|.*(utils|helper|manager|trainer)", re.IGNORECASE)
    return [f"{line}: {name}" for line, name in named if bad.match(name)]


def no_leftovers(module: str, source: str) -> list[str]:
    """No print outside log and __main__, no notes to oneself, no postponed annotations: the checks under test need real ones."""
    faults = [f"{i}: {m[0]}" for i, line in enumerate(source.splitlines(), 1) if (m := re.search(r"\b(TODO|FIXME|XXX)\b", line))]
    faults += [f"{line}: {name}" for line, name, _ in imports(module, source) if name == "__future__.annotations"]
    calls = [n for n in ast.walk(parsed(source)) if isinstance(n, ast.Call)]
    return faults + [
        f"{c.lineno}: print" for c in calls if dotted(c.func) == "print" and module not in ("programs/log", "__main__")
    ]


def data_is_not_code(module: str, source: str) -> list[str]:
    """Nothing that runs what a file or a program says: no pickles, no eval or exec, no import by name."""
    faults = [f"{line}: {name}" for line, name, _ in imports(module, source) if name.split(".")[0] in {*PICKLES, "importlib"}]
    faults = [f for f in faults if "importlib.metadata" not in f and "importlib.resources" not in f]
    calls = [n for n in ast.walk(parsed(source)) if isinstance(n, ast.Call)]
    faults += [f"{c.lineno}: {dotted(c.func)}" for c in calls if dotted(c.func) in RUNS]
    return faults + [f"{c.lineno}: allow_pickle" for c in calls if any(k.arg == "allow_pickle" for k in c.keywords)]


def draws_are_seeded(module: str, source: str) -> list[str]:
    """No draw from a global generator, and none of them seeded."""
    faults = []
    banned = re.compile(
        r"random\.(?!Random$).*|(np|numpy)\.random\.(?!default_rng$).*|torch\.manual_seed|.*\.(dropout|randn?_like)"
    )
    for call in (n for n in ast.walk(parsed(source)) if isinstance(n, ast.Call)):
        name = dotted(call.func)
        draws = name.startswith("torch.") and name.removeprefix("torch.") in DRAWS
        if banned.fullmatch(name) or (draws and not any(k.arg == "generator" for k in call.keywords)):
            faults.append(f"{call.lineno}: {name}")
    return faults


def text_is_utf8(module: str, source: str) -> list[str]:
    """Every call that opens a file as text names its encoding: without one, Windows takes the one of the user's country."""
    faults, tree = [], ast.parse(source)
    ours = {name.rpartition(".")[2] for _, name, _ in imports(module, source) if name.startswith("minitune")}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, named = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
        method, text = name.rpartition(".")[2], [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        binary = any(re.fullmatch(r"[rwax+]*b[rwax+]*", str(arg)) for arg in text)
        positional = {"read_text": 1, "write_text": 2, "open": 4 if name == "open" else 3}.get(method)
        another = name.partition(".")[0] in ours | {"os"}
        if positional and not binary and not another and "encoding" not in named and len(call.args) < positional:
            faults.append(f"{call.lineno}: {name} without encoding")
    return faults


WRITTEN = (  # each writes a tensor, or something that may be one
    *("x[0] = 1", "x += 1", "x.grad = None", "y = x * 2; y += 1", "y = 0.0; y = torch.zeros(3); y += 1", "self.m[0] = 1"),
    *("sums = {}; sums['a'] += x", "params['a'] += x", "params['a'][0] = 1", "for y in params.values(): y *= 2"),
)
Rule = Callable[[str, str], list[str]]
RULES: dict[Rule, list[tuple[str, str]]] = {  # each with the violations that it must find: (module, source)
    third_party: [
        ("data/source", "import yaml"),
        ("text/vocabulary", "import tokenizers"),
        ("data/source", "def f():\n    import tokenizers"),
    ],
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
    text_is_utf8: [
        ("ops", "open('x')"),
        ("ops", "path.open('w')"),
        ("ops", "(folder / 'x').read_text()"),
        ("ops", "path.write_text('x')"),
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
SOURCES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule: Rule):
    faults = [f"minitune/{module}.py:{line}" for module in sorted(SOURCES.keys()) for line in rule(module, SOURCES[module])]
    assert not faults, f"{rule.__doc__}\n" + "\n".join(faults)


def test_benchmarks_and_tests_read_and_write_utf8():
    files = sorted([*(ROOT / "bench").rglob("*.py"), *TESTS.rglob("*.py")])
    assert not [f"{file.name}:{line}" for file in files for line in text_is_utf8(file.stem, file.read_text("utf-8"))]


@pytest.mark.parametrize(
    ("rule", "module", "source"), [(r, *planted) for r, violations in RULES.items() for planted in violations]
)
def test_rule_finds_what_it_forbids(rule: Rule, module: str, source: str):
    assert rule(module, source)
    assert not rule("data", CLEAN)


def imports_no_test_module(source: str) -> list[str]:
    """A test module imports no other one: what two of them need lies in tests/support. None is found from a file's own place."""
    faults = [
        f"{line}: imports {name}" for line, name, _ in imports("", source) if re.match(r"\.|(tests\.)?(test_|conftest)", name)
    ]
    return faults + [f"{i}: __file__" for i, line in enumerate(source.splitlines(), 1) if re.search(r"\bPath\(__file__\)", line)]


def bounds_no_time(source: str) -> list[str]:
    """No test reads a clock or the CPU time: what it would bound is the machine that it runs on. Speed belongs to bench/."""
    clocks = {"perf_counter", "process_time", "monotonic", "thread_time", "ru_utime", "ru_stime"}
    used = [node for node in ast.walk(parsed(source)) if isinstance(node, (ast.Attribute, ast.Name))]
    return [f"{n.lineno}: {ast.unparse(n)}" for n in used if (n.attr if isinstance(n, ast.Attribute) else n.id) in clocks]


TEST_SOURCES = {str(path.relative_to(TESTS)): path.read_text("utf-8") for path in sorted(TESTS.rglob("*.py"))}


@pytest.mark.parametrize("rule", [imports_no_test_module, bounds_no_time], ids=lambda rule: rule.__name__)
def test_tests_keep_their_rules(rule: Callable[[str], list[str]]):
    """support/paths.py is the one file that knows where it lies, and support/scripts is found from there."""
    faults = [
        f"tests/{path}:{line}" for path, source in TEST_SOURCES.items() if path != "support/paths.py" for line in rule(source)
    ]
    assert not faults, f"{rule.__doc__}\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (imports_no_test_module, "from test_stages import run"),
        (imports_no_test_module, "def f():\n    import test_stages"),
        (imports_no_test_module, "from tests.test_stages import run"),
        (imports_no_test_module, "from .test_stages import run"),
        (imports_no_test_module, "from conftest import SCRATCH"),
        (imports_no_test_module, "ROOT = Path(" + "__file__).parent"),
        (bounds_no_time, "start = time.perf_counter()"),
        (bounds_no_time, "from time import monotonic\nmonotonic()"),
        (bounds_no_time, "used = usage.ru_utime + usage.ru_stime"),
    ],
)
def test_a_rule_for_tests_finds_what_it_forbids(rule: Callable[[str], list[str]], source: str):
    assert rule(source)
    assert not rule("from support.models import SMALL\nimport time\ntime.sleep(0.1)")


PINNED = re.compile(r'(^|[\s{,.])dtype\s*=\s*"(?!auto")')


def pinned_without_a_reason(text: str) -> list[str]:
    """A program leaves every dtype to the machine, or says in a comment on that line why it does not."""
    return [f"{i}: {line}" for i, line in enumerate(text.splitlines(), 1) if PINNED.search(line) and "#" not in line]


def test_no_program_pins_a_dtype_without_a_reason():
    programs = {path: path.read_text("utf-8") for path in sorted((ROOT / "programs").rglob("*.toml"))}
    faults = [f"{path.relative_to(ROOT)}:{line}" for path, text in programs.items() for line in pinned_without_a_reason(text)]
    assert not faults, f"{pinned_without_a_reason.__doc__}\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "pin", ['dtype = "bfloat16"', 'model.dtype  = "float32"', 'teacher = { path = "demo", dtype = "bfloat16" }']
)
def test_a_pinned_dtype_is_found(pin: str):
    assert pinned_without_a_reason(f'name = "a"\n{pin}\n')
    assert not pinned_without_a_reason(f'{pin}  # half the bytes\ndtype = "auto"\nteacher = {{ path = "demo" }}\n')
