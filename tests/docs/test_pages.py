"""Pages in docs/: a reader who does what they say gets what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support import pages
from support.pages import PAGES, Reader


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_true(
    page: Path, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], None]
) -> None:
    Reader(tmp_path, tiny, monkeypatch, stop_at).read(page)


FAULTS = [
    ("```bash\npython -m minitune ls --all\n```", r"page.md:2: python -m minitune ls --all ended with 2: minitune: ls --all"),
    ("```bash\n# first\npython -m minitune check \\\n  lora train.lr=1\n```", r"page.md:3: .*lr is train.optimizer.lr"),
    ("```bash\ncargo build\n```", r"page.md:2: cargo is no command of minitune"),
    ("Text.\n```toml\n[[stage]]\nop = 'lora'\nrang = 4\n```", r"page.md:3: .*unknown field `rang`"),
    ("```toml\na = = 2\n```", r"page.md:2: .*line 1"),
    (
        "```bash\npython -m minitune show-sample lora -n 1\n```\n```text\nmask  9 x 0\n```",
        r"page.md:5: show-sample",
    ),
    ("```jsonl rows.jsonl\n{}\n{'a': 1}\n```", r"page.md:3: Expecting property name"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=[text.split("\n")[1] for text, _ in FAULTS])
def test_a_fault_of_a_page_is_found_with_its_line(
    text: str,
    message: str,
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: Callable[[int], None],
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=message):
        Reader(tmp_path, tiny, monkeypatch, stop_at).read(tmp_path / "page.md")


def test_python_of_a_page_fails_at_its_line(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], None]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("One.\n\n```python\nx = 1\nx.missing\n```\n", encoding="utf-8")
    with pytest.raises(AttributeError) as info:
        Reader(tmp_path, tiny, monkeypatch, stop_at).read(page)
    assert info.traceback[-1].lineno == 4  # counted from 0
