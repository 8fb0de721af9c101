"""Every page is in the index and in the site's navigation, and every link leads to a file and a heading that are there."""

import re
from pathlib import Path

import pytest
import yaml

from support.paths import ROOT

pytestmark = pytest.mark.fast

DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
LINKING = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links_of(page: Path) -> list[tuple[str, str]]:
    """(text, target) of the links of a page, without those in code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return LINK.findall(text)


def anchors_of(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", text.lower()) for text in headings]
    return {text.strip().replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for _, target in links_of(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name} links to {target}, a heading that is not there"


def test_every_page_is_in_the_index_once_and_in_the_navigation_in_its_order() -> None:
    listed = [(text, target) for text, target in links_of(INDEX) if re.fullmatch(r"[\w-]+\.md", target)]
    pages = {page.name for page in DOCS.glob("*.md")} - {INDEX.name}
    assert sorted(target for _, target in listed) == sorted(pages)
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    navigation = yaml.safe_load("nav:" + text.partition("\nnav:")[2])["nav"]
    assert [next(iter(entry.items())) for entry in navigation] == [("Index", INDEX.name), *listed]


def test_the_index_has_a_sentence_for_each_page() -> None:
    entries = re.findall(r"^- (.*)$", INDEX.read_text("utf-8"), re.MULTILINE)
    assert all(re.search(r"\]\([^)]*\)(: [A-Za-z].*\.|, .*)$", entry) for entry in entries)
    assert "(docs/index.md)" in (ROOT / "README.md").read_text("utf-8")
