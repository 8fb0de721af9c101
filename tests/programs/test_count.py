"""Lines on tokenizing: one after a while, and none where it is quick."""

from pathlib import Path

import pytest

from minitune.programs import check as check_module
from minitune.programs import progress
from minitune.programs.progress import LINE_EVERY_S, Count
from support.programs import LORA, TRAIN, start

pytestmark = pytest.mark.fast


def test_a_count_says_a_line_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, LINE_EVERY_S, LINE_EVERY_S + 1, 2 * LINE_EVERY_S])
    monkeypatch.setattr(progress, "monotonic", lambda: next(seconds))
    said: list[str] = []
    count = Count(said.append, "tokenizing train")
    for n in (1, 20, 300, 4000):
        count(n)
    assert said == ["tokenizing train: 20 samples", "tokenizing train: 4,000 samples"]


@pytest.mark.parametrize("loss", ["cross_entropy", "dpo", "kto"])
@pytest.mark.parametrize("length", ["auto", "128"])
def test_check_counts_every_sample_of_a_table_that_it_tokenizes(
    loss: str, length: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, list[int]] = {}

    def counting(say: object, title: str) -> object:
        return counts.setdefault(title, []).append

    monkeypatch.setattr(check_module, "Count", counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = {"cross_entropy": "train", "dpo": "pairs", "kto": "unpaired"}[loss]
    words = [f"data.{table}.seq_len={length}", f"train.data={table}"]
    words += [] if loss == "cross_entropy" else [f'train.loss={{kind="{loss}",beta=0.1}}']
    assert start(tmp_path, tiny, LORA + TRAIN, *words, verb=("check",)) == 0
    n = 80 if loss == "kto" else 40
    assert counts[f"tokenizing {table}"] == list(range(1, n + 1))
