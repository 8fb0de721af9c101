"""Recipes of programs/recipes with their plans, from which the table in docs/recipes.md and a line in each file are written.

    PYTHONPATH=$PWD:$PWD/tests python -m support.recipes      writes both anew

A plan is that of a processor which multiplies bfloat16, also where this is written on another one. The GPU that is named
is the smallest of which a plan takes no more than FILLED: the rest is for what a plan does not count, and for the larger
chunks in which a GPU computes logits.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from minitune import hardware
from minitune.io import paths
from minitune.programs import program
from minitune.programs.plan import Planned, planned
from minitune.programs.stages.adapt import LoraStage
from minitune.programs.stages.train import Train
from support.paths import ROOT

PAGE = ROOT / "docs/recipes.md"
COMMAND = "PYTHONPATH=$PWD:$PWD/tests python -m support.recipes"
HEADING = "## The recipes\n"
INTRODUCTION = f"""\
This table is written by `{COMMAND}`, from the files and from `plan`.

| recipe | model | GPU of at least | step [MiB] | tokens a step | TFLOP a step | rate | rank, alpha | epochs | source |
|---|---|---|---|---|---|---|---|---|---|
"""
RECIPES = {name: file for name, file in paths.shipped().items() if name.startswith("recipes/")}
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)  # GB that are sold, of which nearly as many GiB can be used
FILLED = 0.8
MIB = 2**20
PLAN = re.compile(r"^# plan: .*$", re.MULTILINE)
SHAPE = re.compile(r"# its shape is (configs/models/[\w.-]+\.toml)$", re.MULTILINE)
HUB = re.compile(r"^# python -m minitune download (\S+)$", re.MULTILINE)
LINK = re.compile(r"https://[^\s,)]+[^\s,).;]")


class Recipe(NamedTuple):
    """Recipe with its training stage as it is planned."""

    name: str
    text: str
    loaded: program.Program
    plan: Planned
    gpu: int  # GB

    @property
    def n_tokens(self) -> int:
        """Tokens of a step."""
        step = self.plan.step
        return step.n_rows * step.n_tokens * step.n_micro_batches

    @property
    def tflop(self) -> str:
        """Floating-point operations of a step, in three digits."""
        return f"{float(f'{self.plan.flops_per_token * self.n_tokens / 1e12:.3g}'):,.0f}"

    @property
    def line(self) -> str:
        """Line of the file on what a step needs."""
        memory = f"{self.plan.n_bytes / MIB:,.0f} MiB"
        return f"# plan: {memory} and {self.tflop} TFLOP for a step of {self.n_tokens:,} tokens; a GPU of {self.gpu} GB or more"

    def row(self) -> str:
        """Row of the table."""
        model, *numbers, source = file_cells(self.text, self.loaded)
        needs = [f"{self.gpu} GB", f"{self.plan.n_bytes / MIB:,.0f}", f"{self.n_tokens:,}", self.tflop]
        return f"| {' | '.join([f'`{self.name}`', model, *needs, *numbers, source])} |\n"


def file_cells(text: str, loaded: program.Program) -> list[str]:
    """Cells that a recipe's file says without a plan: model, rate, rank and alpha, epochs, sources."""
    lora = next(stage for stage in loaded.stage if isinstance(stage, LoraStage))
    train = next(stage for stage in loaded.stage if isinstance(stage, Train))
    return [
        HUB.findall(text)[0],
        f"{train.optimizer.lr:.0e}".replace("e-0", "e-"),
        f"{lora.rank}, {lora.alpha:g}",
        f"{train.epochs:g}",
        ", ".join(f"[{tool(link)}]({link})" for link in dict.fromkeys(LINK.findall(text))),
    ]


def tool(link: str) -> str:
    """Who has written the page behind a link."""
    known = {
        "DenseMixer": "DenseMixer", "axolotl": "Axolotl", "torchtune": "torchtune", "ms-swift": "ms-swift",
        "thinkingmachines": "Schulman et al.", "ai.google.dev": "Google", "mistral-finetune": "Mistral", "open-instruct": "AI2",
        "smol-course": "Hugging Face", "alignment-handbook": "Hugging Face", "granite-snack": "IBM", "openai-cookbook": "OpenAI",
    }  # fmt: skip
    return next(name for word, name in known.items() if word in link)


def by_shape(text: str) -> str:
    """Override that puts the shape of a recipe's model in the place of its folder, on a processor and in bfloat16."""
    (shape,) = SHAPE.findall(text)
    return f'model={{ config = "{shape}", tokenizer = "demo", device = "cpu", dtype = "bfloat16" }}'


def recipe(name: str) -> Recipe:
    """Recipe of a name with its plan."""
    text = RECIPES[name].read_text("utf-8")
    loaded = program.load(RECIPES[name], [by_shape(text)])
    with patch.object(hardware, "multiplies_bfloat16", lambda device: True):
        (plan,) = planned(loaded)
    gpu = next(n for n in GPUS if plan.n_bytes <= FILLED * n * 2**30)
    return Recipe(name, text, loaded, plan, gpu)


def recipes() -> Iterator[Recipe]:
    """All recipes, by name."""
    return map(recipe, sorted(RECIPES))


def write(file: Path, text: str) -> None:
    if file.read_text("utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    every = list(recipes())
    for one in every:
        write(RECIPES[one.name], PLAN.sub(one.line, one.text))
    page = PAGE.read_text("utf-8")
    write(PAGE, page[: page.index(HEADING) + len(HEADING)] + INTRODUCTION + "".join(one.row() for one in every))
