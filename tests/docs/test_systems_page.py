"""docs/systems.md: its extras and bounds are those of pyproject.toml, and no export, tracker or launcher is left out."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement

from minitune.programs.log import LogConfig
from minitune.programs.stages.export import Export
from support.paths import ROOT

pytestmark = pytest.mark.fast

PAGE = (ROOT / "docs/systems.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = "part of minitune"


def rows_of(column: str) -> list[dict[str, str]]:
    """Rows of the tables that have a column, each by the names of its table's head."""
    found = []
    for table in re.findall(r"^\|.*\|\n\|[-|]+\|\n(?:\|.*\|\n)+", PAGE, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found += [dict(zip(head, row, strict=True)) for row in rows if column in head]
    return found


PACKAGES, PLACES = rows_of("accepted"), rows_of("file")


@pytest.mark.parametrize("row", PACKAGES, ids=lambda row: row["system"])
def test_a_requirement_is_that_of_pyproject_and_admits_the_version_that_was_tested(row: dict[str, str]) -> None:
    extra, accepted, tested = row["extra"].strip("`"), row["accepted"].strip("`"), row["tested"]
    if extra == "none":
        assert not accepted
        return
    required = PROJECT["dependencies"] if extra == CORE else EXTRAS[extra]
    assert accepted in required, f"docs/systems.md: {accepted} is not what pyproject.toml has in {extra}"
    assert tested == "stand-in" or Requirement(accepted).specifier.contains(tested)


def test_every_extra_that_runs_something_has_a_row() -> None:
    named = {row["extra"].strip("`") for row in [*PACKAGES, *PLACES]} - {"none", CORE}
    assert named <= set(EXTRAS)
    assert set(EXTRAS) - named == {"docs"}  # of the site


def test_what_is_run_and_where_is_there() -> None:
    for row in [*PACKAGES, *PLACES]:
        tests = re.findall(r"`(tests/[\w/]+\.py)`", row["what is run"])
        assert tests, row["system"]
        assert all((ROOT / path).is_file() for path in tests), tests
        assert "](" in row["page"]


def lowered(rows: list[dict[str, str]]) -> set[str]:
    return {row["system"].casefold() for row in rows}


def test_every_export_has_a_row() -> None:
    formats = set(get_args(Export.__annotations__["format"]))
    assert len(formats) >= 5
    assert formats <= lowered(PACKAGES), f"docs/systems.md has no row for {sorted(formats - lowered(PACKAGES))}"


def test_every_tracker_has_a_row() -> None:
    trackers = {name.replace("wandb", "weights & biases") for name in LogConfig.__struct_fields__} - {"every", "watch"}
    assert len(trackers) == 4
    assert trackers <= lowered(PACKAGES)


def test_every_place_to_start_minitune_has_a_row() -> None:
    files = {row["file"].strip("`") for row in PLACES}
    assert all((ROOT / file).is_file() for file in files)
    there = {path.name for path in (ROOT / "launch").iterdir()} - {"__pycache__"}
    assert {Path(file).parts[1] for file in files} == there
