"""The repository passes its own tools, and CI runs the command that the README gives."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from minitune.nn.elementwise import rms_norm
from support import signatures
from support.paths import ROOT


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "pyright"])
def test_tool_is_content(command: str):
    tool, *options = command.split()
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed; it is part of the extra `test`")
    options += ["--pythonpath", sys.executable] if tool == "pyright" else []
    result = subprocess.run([sys.executable, "-m", tool, *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("command", "source"), [("ruff check -", "import os\n"), ("ruff format --check -", "x  =  1\n")])
def test_tool_finds_a_fault(command: str, source: str):
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, input=source, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr


def test_ci_runs_what_the_readme_says():
    for path in ("README.md", ".ci/run"):
        assert "pip install -e '.[test]' && pytest" in (ROOT / path).read_text(encoding="utf-8"), path


FAKE_PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin" && echo "PATH=$3/bin:$PATH; export PATH" > "$3/bin/activate"
for tool in pip pytest python; do
  printf '#!/bin/sh\necho "$0 $*"\ncase "%s $*" in "$BROKEN"*) exit 1 ;; esac\n' $tool > "$3/bin/$tool" && chmod +x "$3/bin/$tool"
done
"""


@pytest.mark.parametrize(
    "broken", ["pip install torch==2.13.0", "pip install --no-deps", "pip install -e .[test]", "pytest ", "pytest tests", None]
)
def test_ci_fails_when_a_step_fails_and_leaves_nothing(tmp_path: Path, broken: str | None):
    """With a Python whose pip and pytest only echo: the real steps take minutes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "bin" / "python3.11").write_text(FAKE_PYTHON, encoding="utf-8")
    (tmp_path / "bin" / "python3.11").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "scratch"), "BROKEN": broken or "nothing"}
    result = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    assert (result.returncode == 0) == (broken is None), result.stdout + result.stderr
    assert ("all of it took" in result.stdout) == (broken is None)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_size_that_differs_between_arguments_or_in_the_result_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeCheckError, match="D is 4"):
        rms_norm(x, torch.ones(4), 1e-5)
    with pytest.raises(TypeCheckError, match="parameter w"):
        rms_norm(x, np.ones(3), 1e-5)  # pyright: ignore[reportArgumentType]

    def twice(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return torch.cat((x, x))

    def stacked(x: Float[Tensor, "n d"], times: int) -> Float[Tensor, "{times} n d"]:
        return x.expand(times, *x.shape)

    with pytest.raises(TypeCheckError, match="n is 4"):
        signatures.check(twice)(x)
    assert signatures.check(stacked)(x, 3).shape == (3, 2, 3)
    with pytest.raises(TypeCheckError, match="times"):
        signatures.check(stacked)(x, "3")
