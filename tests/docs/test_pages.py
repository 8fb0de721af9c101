"""Pages in docs/: a reader who does what they say gets what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support import pages
from support.pages import PAGES, RUN_ELSEWHERE, Reader, blocks_of, commands_of
from support.paths import ROOT
from support.program_ranks import metrics_of
from support.ranks import Ranks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_true(
    page: Path, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], None]
) -> None:
    Reader(tmp_path, tiny, monkeypatch, stop_at).read(page)


def test_the_training_on_the_page_of_sharding_is_that_of_one_process_on_any_number(ranks: Ranks) -> None:
    (script,) = (block.text for block in blocks_of(ROOT / "docs/sharding.md", "python") if block.file == "train.py")
    (alone,) = ranks.run(1, metrics_of, script)
    for n in (2, 3):
        for metrics in ranks.run(n, metrics_of, script):
            assert metrics == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("page", "words"), RUN_ELSEWHERE)
def test_what_a_page_has_only_checked_is_run_by_what_is_named(page: str, words: str) -> None:
    runner = RUN_ELSEWHERE[page, words]
    for shown in [page, runner] if runner.endswith(".md") else [page]:
        commands = [command for block in blocks_of(ROOT / shown, "bash") for _, command in commands_of(block)]
        assert f"python -m minitune {words}" in commands
    if runner.endswith(".py"):
        text = (ROOT / runner).read_text("utf-8")
        assert f'PAGE = ROOT / "{page}"' in text
        assert f'file_of(PAGE, "{words}")' in text
        assert f'snippets_about(PAGE, "{words}")' in text
    else:
        assert (runner, words) not in RUN_ELSEWHERE


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
