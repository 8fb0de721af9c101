"""Page docs/api.md, written from the signatures and docstrings of the public names.

    PYTHONPATH=tests python -m support.api_page      writes the page anew

Signatures are those of the source: types keep the names that they have there, with or without the checks of the tests.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minitune.io.field_comments import comments_of
from support.paths import ROOT
from support.reference_page import shown_as_is

PAGE = ROOT / "docs/api.md"
COMMAND = "PYTHONPATH=tests python -m support.api_page"
WIDTH = 100
INTRODUCTION = f"""\
# Names for programs of your own

What [research.md](research.md) shows in use, with all arguments. Sizes in brackets are those of tensors: B rows, T tokens each,
V vocabulary, D width of the model, R rank. Losses and log-probabilities are in nats. Methods stand under their class.

This page is written by `{COMMAND}` from the docstrings in `minitune/`.
"""

# heading -> {module: names}
SECTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Models": {
        "minitune.models": ("load", "open", "Model", "Probe"),
        "minitune.models.block": ("block",),
        "minitune.models.compile": ("wrap",),
    },
    "Adapters": {
        "minitune.lora": ("Lora",),
        "minitune.algorithms.merging": ("merge_trainable", "Merged"),
        "minitune.types": ("Delta", "Adapted"),
    },
    "Batches": {
        "minitune.types": ("AnyBatch", "Batch", "Pairs", "UnpairedBatch", "TeacherBatch", "SeededBatch"),
        "minitune.data": ("read_batches", "Source", "Cursor"),
        "minitune.nn.dropout": ("seeded",),
    },
    "Objectives": {
        "minitune.types": ("Mean",),
        "minitune.algorithms": (
            "Objective",
            "SupervisedLoss",
            "sft",
            "PreferenceLoss",
            "preference",
            "unpaired_preference",
            "TeacherLoss",
            "distillation",
            "Teacher",
            "apply_trainable",
            "split_trainable",
            "answer_logps",
        ),
    },
    "Losses": {
        "minitune.losses": (
            "CrossEntropy",
            "cross_entropy",
            "Dpo",
            "dpo",
            "Ipo",
            "ipo",
            "Hinge",
            "hinge",
            "ApoZero",
            "apo_zero",
            "ApoDown",
            "apo_down",
            "SimPO",
            "simpo",
            "Orpo",
            "orpo",
            "Cpo",
            "cpo",
            "Kto",
            "kto",
            "ForwardKL",
            "forward_kl",
            "ReverseKL",
            "reverse_kl",
            "SymmetricKL",
            "symmetric_kl",
            "JensenShannon",
            "jensen_shannon",
        ),
        "minitune.types": ("LogProbs",),
    },
    "Optimizers": {
        "minitune.optim": (
            "GradientTransformation",
            "AdamW",
            "AdamW8bit",
            "SGD",
            "Muon",
            "chain",
            "ClipByGlobalNorm",
            "ScaleByGlob",
            "ScaleBySchedule",
            "Constant",
            "Linear",
            "Cosine",
            "RoundStochastically",
            "apply_gradients",
        ),
    },
    "Steps": {
        "minitune.types": ("Step", "StepInit", "StepUpdate", "TrainState"),
        "minitune.steps": (
            "train_step",
            "StepOptions",
            "eval_step",
            "sft_step",
            "preference_step",
            "dpo_step",
            "ipo_step",
            "hinge_step",
            "apo_zero_step",
            "apo_down_step",
            "simpo_step",
            "orpo_step",
            "cpo_step",
            "kto_step",
            "kd_step",
        ),
    },
    "Sharding": {
        "minitune.sharding.ranks": ("Ranks",),
        "minitune.models.weights": ("dims",),
        "minitune.sharding.mesh": ("device_mesh",),
        "minitune.sharding.plans": ("named_plan",),
        "minitune.sharding.placements": ("placements", "shard"),
        "minitune.sharding.gather": ("gather",),
        "minitune.sharding.tokens": ("shares_of",),
    },
    "Gradients": {"minitune.autodiff": ("value_and_grad", "per_example", "accumulate", "remat")},
    "Trees": {
        "minitune.tree": ("items", "leaves", "map", "rebuild", "add", "norm", "norms", "n_bytes", "select", "donate"),
    },
    "Generation": {
        "minitune.inference.generate": ("generate", "greedy", "stream"),
        "minitune.inference.sampling": ("Sampling",),
        "minitune.inference.score": ("token_metrics", "TokenMetrics", "continuations", "Score"),
    },
    "Checkpoints": {
        "minitune.checkpoint": (
            "save_state",
            "load_state",
            "list_states",
            "save_tensors",
            "load_tensors",
            "save_folder",
            "FolderExtras",
            "load_params",
        ),
    },
}
# methods by which the rooms of minitune ask one another, which nobody has to call or to write
INTERNAL = {
    *("block_of", "check_dropout", "merge_weight", "with_paths", "path_names", "files", "paths_by_key", "parts", "partitioned"),
    *("divergence", "on_top", "decay", "scratch_bytes", "slice_state", "counts", "is_fusable", "fused_update", "branches"),
    *("gradient_factor", "path_factor", "step_factor", "rounding_after"),
}
ALIASES = {
    "Params": "weights by their Hugging Face names, `[out, in]`: each a tensor, a quantized weight or an `Adapted` one",
    "Deltas": "a `Delta` for each weight that is adapted, by its name",
    "Trainable": "what trains, by the names of weights: a tensor replaces the weight, a `Delta` adapts it",
    "Metrics": "tensors by name; `loss_nats`, `grad_norm`, `skipped`, `not_finite`, the weight under the batch's `counts`, more",
    "Tree": "a tensor, `None`, or a dict, list, tuple or NamedTuple of trees",
}


def page() -> str:
    """Whole text of the page."""
    aliases = [f"- `{name}`: {meaning}." for name, meaning in ALIASES.items()]
    contents = [f"- [{heading}](#{heading.lower()})" for heading in SECTIONS]
    sections = [_section(heading, modules) for heading, modules in SECTIONS.items()]
    return "\n".join([INTRODUCTION, *contents, "", "Types that signatures name:", *aliases, "", "\n\n".join(sections), ""])


def things() -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, object) of every name on the page."""
    for modules in SECTIONS.values():
        for module, names in modules.items():
            for name in names:
                yield f"{module}.{name}", getattr(importlib.import_module(module), name)


def methods(kind: type) -> list[tuple[str, Any]]:
    """(name, function) of the public methods and properties that a class defines itself."""
    found = []
    is_protocol = getattr(kind, "_is_protocol", False)
    for name, thing in vars(kind).items():
        if name in INTERNAL and inspect.isfunction(thing) and not is_protocol:
            continue
        function = inspect.unwrap(getattr(thing, "fget", None) or getattr(thing, "__func__", thing))
        is_called = name == "__call__" and is_protocol
        if (not name.startswith("_") or is_called) and inspect.isfunction(function):
            found.append((name, function))
    return found


def _section(heading: str, modules: Mapping[str, Sequence[str]]) -> str:
    parts = [f"## {heading}"]
    for module, names in modules.items():
        for name in names:
            parts.append(_entry(module, name, getattr(importlib.import_module(module), name)))
    return "\n\n".join(parts)


def _entry(module: str, name: str, thing: Any) -> str:
    """Entry of a function, or of a class with its fields and methods."""
    heading = f"### {name}\n`from {module} import {name}`"
    if not inspect.isclass(thing):
        return f"{heading}\n{_code(_signature(name, thing))}\n{_text(thing.__doc__)}"
    parts = [heading]
    fields = _fields(thing)
    if fields:
        parts.append(_code(f"{name}(\n{fields}\n)"))
    parts.append(_text(thing.__doc__))
    for method, function in methods(thing):
        shown = _signature(method, function)
        if isinstance(vars(thing)[method], property):
            shown = shown.replace("() -> ", ": ")
        parts.append(f"\n{_code(shown)}\n{_text(function.__doc__)}")
    return "\n".join(parts)


def _fields(kind: type) -> str:
    """Fields of a struct, a NamedTuple or a TypedDict, each under its comment; those of a Protocol are no arguments."""
    if getattr(kind, "_is_protocol", False):
        return ""
    lines = []
    comments = comments_of(kind)
    written: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        written |= {node.target.id: ast.unparse(node) for node in _assignments(base)}
    for field, comment in comments.items():
        prefix = "    # "
        if comment:
            lines += textwrap.wrap(comment, WIDTH, initial_indent=prefix, subsequent_indent=prefix)
        lines.append(f"    {written[field]},")
    return "\n".join(lines)


def _assignments(kind: type) -> Iterator[Any]:
    """Annotated fields of a class of minitune, as they are written."""
    if kind.__module__.partition(".")[0] != "minitune":
        return
    definition = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    for node in getattr(definition, "body", ()):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node


def _signature(name: str, function: Any) -> str:
    """Signature as the source has it, on one line or with a line for each argument."""
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(node, ast.FunctionDef)
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    arguments = list(_arguments(node.args))
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in arguments), f"){result}"])


def _arguments(given: ast.arguments) -> Iterator[str]:
    """Arguments with their types and defaults; self is left out."""
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    for number, (one, default) in enumerate(zip(positional, defaults, strict=True), start=1):
        if one.arg != "self":
            yield _argument(one, default)
        if number == len(given.posonlyargs):
            yield "/"
    if given.vararg is not None:
        yield f"*{_argument(given.vararg, None)}"
    elif given.kwonlyargs:
        yield "*"
    for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield _argument(one, default)
    if given.kwarg is not None:
        yield f"**{_argument(given.kwarg, None)}"


def _argument(one: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(one.annotation)}" if one.annotation is not None else ""
    if default is None:
        return one.arg + kind
    return f"{one.arg}{kind}{' = ' if kind else '='}{ast.unparse(default)}"


def _code(text: str) -> str:
    return f"```py\n{text}\n```"  # python is what a reader runs


def _text(docstring: str | None) -> str:
    """Docstring as paragraphs of Markdown."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(shown_as_is(" ".join(paragraph.split())) for paragraph in paragraphs)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
