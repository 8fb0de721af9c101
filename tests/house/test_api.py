"""docs/api.md is what the docstrings and signatures of the public names say, and has every name that the pages use."""

import inspect
import re

import pytest

from support import api_page
from support.paths import ROOT
from support.public_names import names_in

PAGE = api_page.PAGE.read_text("utf-8")
THINGS = dict(api_page.things())


def test_the_page_is_what_the_source_says() -> None:
    help_ = f"docs/api.md is not what the source says; run {api_page.COMMAND}"
    assert api_page.page() == PAGE, help_


@pytest.mark.parametrize("page", ["README.md", "docs/research.md", "docs/sharding.md"])
def test_every_name_that_a_page_uses_is_there(page: str) -> None:
    used = [thing for thing in names_in((ROOT / page).read_text("utf-8")).values() if inspect.getmodule(thing)]
    missing = [thing for thing in used if not any(thing is other for other in THINGS.values())]
    assert not missing, f"{page} uses {missing}, which tests/support/api_page.py does not list"


@pytest.mark.parametrize("name", THINGS)
def test_every_name_says_what_one_gets(name: str) -> None:
    thing = THINGS[name]
    parts = api_page.methods(thing) if inspect.isclass(thing) else []
    for part, function in [(name, thing), *parts]:
        assert inspect.getdoc(function), f"{name}: write the docstring of {part}"


def test_every_link_of_the_page_has_its_heading() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) == headings
