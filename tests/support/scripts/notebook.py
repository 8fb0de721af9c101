"""Cells of a notebook, run in order as its reader runs them: notebook.py FILE [NAME ...]

The last line that it prints has the variables of these names. What Jupyter adds to Python is done here: a line
`!python -m minitune ...` is a command, with {NAME} for a variable, and `%pip` is left out. A command that runs a program
measures it on few of the demo's held-out rows, in place of all of them.
"""

import json
import shlex
import sys
from pathlib import Path

from minitune.__main__ import main
from minitune.io.paths import locate, shipped

HELD_OUT = Path("heldout.jsonl")


def run_command(line: str, names: dict) -> None:
    """Run a command of minitune in this process; the names stand for the variables in it."""
    words = shlex.split(line.removeprefix("!").format_map(names))
    assert words[:3] == ["python", "-m", "minitune"], f"{line}, expected python -m minitune"
    few = [f"data.heldout.path={HELD_OUT}"] if words[3] in shipped() else []
    assert main([*words[3:], *few]) == 0, line


def run_cell(source: str, place: str, names: dict) -> None:
    if source.startswith("!"):
        for line in source.replace("\\\n", " ").splitlines():
            run_command(line, names)
    elif not source.startswith("%pip install"):
        exec(compile(source, place, "exec"), names)


file, *wanted = sys.argv[1:]
names: dict = {}
rows = locate("demo/orders-heldout.jsonl").read_text(encoding="utf-8").splitlines()
HELD_OUT.write_text("\n".join(rows[:24]) + "\n", encoding="utf-8")
for cell in json.loads(Path(file).read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        run_cell("".join(cell["source"]), f"{Path(file).name}, cell {cell['id']}", names)
print(json.dumps({name: names[name] for name in wanted}))
