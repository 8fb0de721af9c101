"""The cache verb, and the limit by which the oldest go."""

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.io import array_cache, cache_size

KEYS = [array_cache.key(i) for i in range(4)]
DAY_S = 24 * 3600.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of three folders of about 4 KiB, used 3, 2 and 0 days ago, among other things."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "minitune"
    for key, days in zip(KEYS, (3, 2, 0), strict=False):
        write(folder / key)
        os.utime(folder / key, (time.time() - days * DAY_S,) * 2)
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").write_text("mine", encoding="utf-8")
    return folder


def write(folder: Path) -> None:
    with array_cache.filling(folder) as aside:
        np.save(aside / "tokens.npy", np.arange(500))


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_the_verb_shows_and_empties_and_removes_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = cache / f"{array_cache.UNFINISHED}{os.uname().nodename}-999999999-x"
    left.mkdir()
    assert main(["cache"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{cache}: 3 folders, 12.")
    assert first.endswith("; beyond 50.0 GiB the oldest go")
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() - 3 * DAY_S))
    assert second == f"the oldest was last used on {day}; `cache clear` removes all"
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith(f"{cache}: 3 of 3 folders removed, 12.")
    assert names(cache) == {"notes"}
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{cache}: 0 folders, 0 B; beyond 50.0 GiB the oldest go\n"
    assert main(["cache", "clera"]) == 2
    assert capsys.readouterr().err == "cache: 'clera' is unknown, expected cache or cache clear\n"


def test_data_sets_and_models_that_were_fetched_are_counted_and_removed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = cache / "hub/owner--set/0123abc/data"
    rows.mkdir(parents=True)
    (rows / "train.jsonl").write_bytes(b"x" * 3 * 2**20)
    (cache / "registered/0a1b/model").mkdir(parents=True)
    (cache / "registered/0a1b/model/model.safetensors").write_bytes(b"x" * 2**20)
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "data sets and models that were fetched: 2, 4.0 MiB; they stay until `cache clear`"
    assert main(["cache", "clear"]) == 0
    assert ": 5 of 5 folders removed, 4.0 MiB" in capsys.readouterr().out
    assert not any((cache / "hub").iterdir())
    assert not any((cache / "registered").iterdir())


def test_the_folder_that_was_used_longest_ago_goes_first(cache: Path) -> None:
    one = sum(file.stat().st_size for file in (cache / KEYS[0]).iterdir())
    assert cache_size.keep_below(cache, 3 * one) == []
    assert [entry.folder.name for entry in cache_size.keep_below(cache, 3 * one - 1)] == KEYS[:1]
    assert array_cache.is_whole(cache / KEYS[1])  # which is a use
    assert cache_size.keep_below(cache, 0) == []  # what may be in use stays, however large it is
    assert names(cache) == {*KEYS[1:3], "notes"}


def test_a_new_folder_makes_room_before_it_is_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "keep_below", partial(cache_size.keep_below, limit=5000))
    write(cache / KEYS[3])
    assert names(cache) == {*KEYS[2:], "notes"}
    with pytest.raises(InputError, match="is damaged"), array_cache.intact(cache / KEYS[0], "tokens"):
        array_cache.load(cache / KEYS[0], "tokens")
