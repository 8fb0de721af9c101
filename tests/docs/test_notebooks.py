"""Notebooks: they are stripped of outputs, they link to what is there, and their cells run in order in a process of their own."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

FOLDER = ROOT / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SCRIPT = ROOT / "tests/support/scripts/notebook.py"
BOOKS = {path.stem: json.loads(path.read_text("utf-8")) for path in NOTEBOOKS}


def sources(name: str, kind: str) -> list[str]:
    """Texts of the cells of a kind."""
    return ["".join(cell["source"]) for cell in BOOKS[name]["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_version_4_without_outputs(path: Path) -> None:
    book = BOOKS[path.stem]
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"{path.name}: clear the outputs of {cell['id']}"
    assert path.read_text("utf-8") == json.dumps(book, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_says_how_to_install_and_links_to_pages_that_are_there(name: str) -> None:
    text, code = sources(name, "markdown"), sources(name, "code")
    assert "**Install.**" in text[0]
    assert code[0] == "%pip install -q -e '../..[report]'"
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(text))
    assert targets
    assert all((FOLDER / target).is_file() for target in targets)
    assert f"notebooks/{name}.ipynb" in (ROOT / "docs/index.md").read_text("utf-8")


def executed(name: str, steps: int, folder: Path, *names: str) -> dict:
    """Variables of these names after all cells of a notebook, with so many steps."""
    env = {**os.environ, "NOTEBOOK_STEPS": str(steps), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(SCRIPT), str(FOLDER / f"{name}.ipynb"), *names]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_notebook_on_sft_trains_twice(tmp_path: Path) -> None:
    found = executed("sft", 3, tmp_path, "losses", "rows", "n_params", "n_trained")
    assert found["losses"] == sorted(found["losses"], reverse=True)
    assert [row["step"] for row in found["rows"]] == [1, 2, 3]
    assert found["n_params"] > 10 * found["n_trained"] > 0
    assert (tmp_path / "runs/notebook/deltas/adapter_config.json").is_file()


def test_the_notebook_on_dpo_begins_at_log_2_and_moves(tmp_path: Path) -> None:
    found = executed("dpo", 2, tmp_path, "history", "pair")
    first, second = found["history"]
    assert first["loss_nats"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_accuracy"] == 0.0
    assert second["reward_accuracy"] > 0.0
    assert found["pair"]["chosen"] != found["pair"]["rejected"]
    summary = json.loads((tmp_path / "runs/notebook/summary.json").read_text("utf-8"))
    assert {"before", "after", "sft", "dpo"} <= set(summary)


def test_the_notebook_on_sweeps_compares_the_rates_that_it_names(tmp_path: Path) -> None:
    found = executed("sweep", 2, tmp_path, "RATES", "record", "losses", "best")
    assert [one["point"] for one in found["record"]["adapters"]] == [{"optimizer.lr": rate} for rate in found["RATES"]]
    first, last = found["losses"]
    assert len(set(first)) == 1  # one loss before any has moved
    assert len(set(last)) == len(found["RATES"])
    assert last[found["best"]] == min(last)
