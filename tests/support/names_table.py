"""Table of other tools' names at the end of docs/from-trl.md, written from those that messages know.

PYTHONPATH=tests python -m support.names_table      writes it anew
"""

from minitune.programs.field_names import KEYS, NO_KEYS
from support.paths import ROOT
from support.reference_page import shown_as_is

PAGE = ROOT / "docs/from-trl.md"
COMMAND = "PYTHONPATH=tests python -m support.names_table"
HEADING = "## Names\n"
INTRODUCTION = f"This table is written by `{COMMAND}`.\n\n| elsewhere | here | |\n|---|---|---|\n"


def table() -> str:
    """Rows of the table, with its introduction."""
    rows = [(names, f"`{key}`", note) for key, note, names in KEYS] + [(names, "", note) for note, names in NO_KEYS]
    lines = [f"| {quoted(names)} | {key} | {shown_as_is(note)} |" for names, key, note in rows]
    return INTRODUCTION + "\n".join(lines) + "\n"


def quoted(names: str) -> str:
    """Names of a row, each as code."""
    return ", ".join(f"`{name}`" for name in names.split())


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text[: text.index(HEADING) + len(HEADING)] + table(), encoding="utf-8")
