"""Every recipe: one for each family, with the figures that plan gives, and a run and a measured step at toy size."""

import importlib.util
import json
import re
from pathlib import Path

import msgspec
import pytest
import torch

from minitune import models
from minitune.__main__ import main
from minitune.algorithms.supervised import sft
from minitune.interop.peft.load import load_adapter
from minitune.io import toml_writing
from minitune.models import Model
from minitune.nn import head
from minitune.nn.attention import blockwise
from minitune.nn.dropout import seeded
from minitune.optim import adamw, transforms
from minitune.programs import program
from minitune.programs.plan import planned
from minitune.programs.stages.quantize import Quantize
from minitune.steps import train_step
from support import recipes
from support.families import config_of
from support.models import random_params
from support.paths import ROOT
from support.recipes import HEADING, INTRODUCTION, PAGE, RECIPES, recipe

_spec = importlib.util.spec_from_file_location("memory", ROOT / "bench/memory.py")
assert _spec is not None
assert _spec.loader is not None
memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory)

TEXTS = {name: file.read_text("utf-8") for name, file in RECIPES.items()}
STALE = f"not what plan says; run {recipes.COMMAND}"
# Planned in seconds each: 4-bit weights, experts, dropout.
SLOW = {name for name, text in TEXTS.items() if re.search("nf4|dropout", text.partition("\nname")[2]) or "expert" in text}
# Measured in plain pytest, because each has a part of which test_plan.py measures no step: norms of heads, joined matrices,
# stacked experts and their deltas, a shared expert, 4-bit weights with dropout.
MEASURED = [
    f"recipes/{name}"
    for name in (
        "qwen3-8b-lora", "phi-4-lora", "gpt-oss-20b-lora", "llama-4-scout-lora", "qwen1.5-moe-a2.7b-lora", "ministral-3-3b-qlora",
    )
]  # fmt: skip
SIZES = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 88, "d_head": 22, "d_ff": 262, "vocab_size": 1024}


def real_model(name: str) -> Model:
    """Model of a recipe, without weights."""
    (shape,) = recipes.SHAPE.findall(TEXTS[name])
    return models.open_config(ROOT / shape)


def toy_model(name: str) -> Model:
    """Small model of the same family, with the vocabulary of the demo's tokenizer."""
    family = real_model(name).family
    config = config_of(family.name)
    sizes = SIZES
    if config.experts is not None:
        sizes = {**SIZES, "experts": msgspec.structs.replace(config.experts, d_ff=98)}
    return Model(family, msgspec.structs.replace(config, **sizes))


def toy_words(name: str, folder: Path, tiny: Path) -> list[str]:
    """Overrides that make a recipe small: its shape, its data and its rank, and one step of two short rows."""
    model = toy_model(name)
    fields = {key: value for key, value in msgspec.to_builtins(model.config).items() if value is not None}
    shape = folder / "shape.toml"
    shape.write_text(toml_writing.dumps({"family": model.family.name, **fields}), encoding="utf-8")
    data = [f"data.train.path={tiny / 'orders-train.jsonl'}", "data.train.seq_len=131", "data.train.holdout=0.2"]
    steps = ["train.steps=1", "train.batch_size=2", "train.evaluate.every=1", "lora.rank=4"]
    if model.family.name == "gpt_oss":  # it trains the experts of three of 24 layers
        steps.append('lora.targets=["*.self_attn.*_proj.weight", "*.1.mlp.experts.*_proj"]')
    return [f"out={folder}", f'model={{ config = "{shape}", tokenizer = "demo", dtype = "bfloat16" }}', *data, *steps]


def test_every_family_has_one_recipe() -> None:
    assert sorted(real_model(name).family.name for name in RECIPES) == sorted(models.FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_its_model_its_sources_and_itself(name: str) -> None:
    text = TEXTS[name]
    (hub,) = recipes.HUB.findall(text)
    assert f'path = "models/{hub}"' in text  # where the command above puts the folder
    assert f"# python -m minitune {name} data.train.path=FILE\n" in text
    assert program.load(RECIPES[name]).name == name.removeprefix("recipes/")
    assert all(map(recipes.tool, recipes.LINK.findall(text)))
    assert ("qlora" in name) == any(isinstance(stage, Quantize) for stage in program.load(RECIPES[name]).stage)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - SLOW))
def test_a_recipe_and_the_page_say_what_plan_says(name: str) -> None:
    assert_is_planned(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(SLOW))
def test_a_recipe_that_is_planned_slowly_says_what_plan_says(name: str) -> None:
    assert_is_planned(name)


def assert_is_planned(name: str) -> None:
    """Memory to a hundredth, because signatures that are checked keep a tensor a little longer; all else to the digit."""
    planned = recipe(name)
    (line,) = recipes.PLAN.findall(planned.text)
    said, *others = figures(line)
    wanted, *exact = figures(planned.line)
    assert others == exact, f"{name}: {STALE}"
    assert said == pytest.approx(wanted, rel=0.01), f"{name}: {STALE}"
    row = planned.row().replace(f" {wanted:,} ", f" {said:,} ")
    assert row in PAGE.read_text("utf-8"), f"{PAGE.name}: {STALE}"


def figures(line: str) -> list[int]:
    """MiB, TFLOP and tokens of a step, and GB of a GPU, of the line of a file."""
    return [int(figure.replace(",", "")) for figure in re.findall(r"\d[\d,]*", line)]


def test_the_page_has_a_row_for_each_recipe_that_says_what_its_file_says() -> None:
    _, _, table = PAGE.read_text("utf-8").partition(f"{HEADING}{INTRODUCTION}")
    rows = {cells[1].strip("`"): cells for cells in ([cell.strip() for cell in line.split("|")] for line in table.splitlines())}
    assert list(rows) == sorted(RECIPES)
    for name, cells in rows.items():
        (line,) = recipes.PLAN.findall(TEXTS[name])
        mib, tflop, n_tokens, gpu = figures(line)
        model, *others = recipes.file_cells(TEXTS[name], program.load(RECIPES[name]))
        wanted = [model, f"{gpu} GB", f"{mib:,}", f"{n_tokens:,}", f"{tflop:,}", *others]
        assert cells[2:-1] == wanted, f"{name}: {STALE}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_at_toy_size(name: str, tiny: Path, tmp_path: Path) -> None:
    words = toy_words(name, tmp_path, tiny)
    assert main([name, *words]) == 0
    folder = tmp_path / name.removeprefix("recipes/")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 1
    names = toy_model(name).shapes()
    _, deltas, _ = load_adapter(folder / "deltas", names={key: torch.empty(shape, device="meta") for key, shape in names.items()})
    assert any(delta.b.any() for delta in deltas.values())


@pytest.mark.parametrize("name", [name if name in MEASURED else pytest.param(name, marks=pytest.mark.soak) for name in RECIPES])
def test_a_step_of_a_recipe_takes_what_plan_says_at_toy_size(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "HEAD_CHUNK", 2**14)
    monkeypatch.setattr(head, "HEAD_ROWS", 1)
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    monkeypatch.setattr(adamw, "FUSED_ELEMENTS", {"cpu": 2**14})
    monkeypatch.setattr(transforms, "SLICE_ELEMENTS", {"cpu": 2**13})
    loaded = program.load(RECIPES[name], toy_words(name, tmp_path, tiny))
    (one,) = planned(loaded)
    step = one.step
    params = {key: (w / 20).bfloat16() for key, w in random_params(step.model.config).items()}
    for stage in loaded.stage:
        params = stage.rule.quantize(params) if isinstance(stage, Quantize) else params
    trainable = step.lora.init(params, 0)
    batch = memory.rows(1024, step.n_rows * step.n_micro_batches, step.n_tokens)
    update = train_step(sft(step.model, step.lora), step.optimizer, micro_batch=step.n_rows, donate=True)
    state = update.init(trainable)
    step = step._replace(params=params, trainable=trainable)
    batch = seeded(batch, 0, 0) if step.lora.dropout else batch
    measured = memory.peak_bytes(step, lambda: update.update(params, state, batch))
    assert 0.95 <= measured / one.n_bytes <= 1.05
