"""Pages for those who come from other tools: the keys that they name exist, and are those that messages offer."""

import re
from pathlib import Path

import pytest

from minitune.programs.field_names import KEYS
from support import names_table
from support.paths import ROOT
from support.programs import fields_beside

pytestmark = pytest.mark.fast

TORCHTUNE, TRL = (ROOT / f"docs/from-{tool}.md" for tool in ("torchtune", "trl"))
DOTTED = re.compile(r"`((?:model|data\.\w+|log|lora|full|quantize|qat|train|harness|generate|eval|save|export)\.[\w.]+)`")


def cells_of(text: str) -> list[list[str]]:
    """Cells of the rows of the tables in a text."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.mark.parametrize("page", [TORCHTUNE, TRL], ids=lambda page: page.stem)
def test_every_key_of_a_page_exists(page: Path) -> None:
    keys = {key for _, *here in cells_of(page.read_text("utf-8")) for key in DOTTED.findall(" ".join(here))}
    assert len(keys) > 25
    for key in keys:
        assert key.rpartition(".")[2] in fields_beside(key), f"{page.name}: {key}"


def test_the_page_on_torchtune_and_the_messages_say_the_same() -> None:
    """A name of the left column that a message knows is answered by a key of the right one."""
    here: dict[str, str] = {}
    for key, _, names in KEYS:
        here |= {name: key for name in names.split() if name not in here}
    n_compared = 0
    # what it calls max_seq_length in evaluation is another key than in training
    training, _, _ = TORCHTUNE.read_text("utf-8").partition("## Evaluation, generation")
    for left, right in cells_of(training):
        for name in re.findall(r"`(\w+)(?::[^`]*)?`", left):
            if name.casefold() in here:
                n_compared += 1
                assert here[name.casefold()].rpartition(".")[2] in right, name
    assert n_compared > 25


def test_the_names_of_the_page_on_trl_are_those_that_messages_know() -> None:
    help_ = f"docs/from-trl.md is not what messages say; run {names_table.COMMAND}"
    assert TRL.read_text("utf-8").endswith(f"{names_table.HEADING}{names_table.table()}"), help_
