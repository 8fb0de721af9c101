"""The keys of docs/training.md are those of the stages, decoded as a program's are."""

import re
import tomllib

import msgspec
import pytest

from minitune.programs.loading import ModelSource
from minitune.programs.stages.adapt import LoraStage
from minitune.programs.stages.train import Train
from support.paths import ROOT

pytestmark = pytest.mark.fast

PAGE = (ROOT / "docs/training.md").read_text("utf-8")
LINES = re.findall(r"^\| `([^`]+)`(?: \(of `?\[?(\w+)\]?`?\))? \|", PAGE, re.M)
REST = {
    "": (Train, 'op = "train"\ndata = "train"\nsteps = 3\nbatch_size = 2\n'),
    "lora": (LoraStage, 'op = "lora"\nrank = 2\nalpha = 4.0\ntargets = ["*"]\n'),
    "model": (ModelSource, 'path = "demo"\n'),
}


@pytest.mark.parametrize(("line", "table"), LINES, ids=[line for line, _ in LINES])
def test_an_example_is_decoded_and_says_something_else_than_the_default(line: str, table: str) -> None:
    kind, rest = REST[table]
    given = msgspec.convert(tomllib.loads(rest + line), kind)
    default = msgspec.convert(tomllib.loads(rest), kind)
    key = line.split(" = ")[0]
    assert getattr(given, key) != getattr(default, key)


def test_every_key_of_the_page_stands_there_once_or_more() -> None:
    keys = {line.split(" = ")[0] for line, _ in LINES}
    assert keys >= {"dropout", "neftune_alpha", "decay_factors", "lr_factors", "load_balance", "privacy", "loss_scale"}
    assert keys >= {"loss", "schedule", "evaluate", "dtype"}
