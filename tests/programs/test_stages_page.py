"""The page docs/stages.md is true: its example runs, and every name that it explains exists where it says."""

import importlib
import math
import re

import pytest
import torch

from minitune.lora import Lora
from minitune.optim.adamw import AdamW
from minitune.programs.stages import training_loop
from minitune.programs.stages.train import Train
from minitune.steps import train_step
from support.models import SMALL, model_of, random_batch, random_params
from support.paths import ROOT

PAGE = (ROOT / "docs/stages.md").read_text("utf-8")
(SNIPPET,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_a_number_that_an_objective_reports_is_in_the_row_of_its_step() -> None:
    names: dict = {}
    exec(compile(SNIPPET, "docs/stages.md", "exec"), names)
    lora, params = Lora(2, 4.0, ("*_proj.weight",)), random_params(SMALL)
    step = train_step(names["sft_with_bits"](model_of(SMALL), lora), AdamW(lr=1e-3), micro_batch=2)
    _, metrics = step.update(params, step.init(lora.init(params, 0)), random_batch(SMALL, 5, 9))
    values = {name: value for name, (value,) in training_loop.reading(metrics)().items()}
    row = training_loop.row(Train(data="train", steps=3, batch_size=5), 1, values)
    assert row["loss_bits"] == pytest.approx(row["loss"] / math.log(2), rel=1e-6)
    assert torch.isfinite(torch.tensor(list(row.values()))).all()


def test_every_name_of_the_page_is_where_it_says() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([\w/]+)\.py` \|", PAGE, re.M)
    assert len(rows) == 8
    for name, path in rows:
        assert hasattr(importlib.import_module(f"minitune.{path.replace('/', '.')}"), name), name
    task = next(line for line in PAGE.splitlines() if "`TrainingTask`" in line)
    assert set(re.findall(r"`(\w+)`", task)) - {"TrainingTask"} < set(training_loop.TrainingTask._fields)
