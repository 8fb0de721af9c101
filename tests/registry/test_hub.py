"""Downloads from a server of our own that speaks the Hub's protocol."""

import fnmatch
import json
import os
import shutil
import sys
import time
from pathlib import Path, PurePosixPath, PureWindowsPath

import huggingface_hub
import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.cli.download import download
from minitune.errors import InputError
from minitune.registry import hub
from minitune.registry.hub import FILE
from support.hub_server import COMMIT, INDEX, NEEDED, REPO, SHARDS, Hub, command, contents, fetch


def test_only_what_is_needed_is_fetched_and_only_once(server: Hub, tmp_path: Path) -> None:
    assert fetch(tmp_path / "a/b") == ({name: len(data) for name, data in NEEDED.items()}, COMMIT)
    assert contents(tmp_path / "a/b") == NEEDED
    assert server.fetched() == sorted(NEEDED)
    server.log.clear()
    fetch(tmp_path / "a/b", revision="v1")
    assert server.fetched() == []
    (tmp_path / "a/b" / SHARDS[0]).write_bytes(b"cut")
    os.utime(tmp_path / "a/b" / SHARDS[0], (1, 1))  # by the machine that went down, and by nobody later
    (tmp_path / "a/b/config.json").unlink()
    fetch(tmp_path / "a/b")
    assert contents(tmp_path / "a/b") == NEEDED
    assert server.fetched() == sorted([SHARDS[0], "config.json"])


@pytest.mark.parametrize("content", [b"my own weights", NEEDED[SHARDS[0]]])
def test_a_file_that_no_download_brought_stays(server: Hub, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / SHARDS[0]).write_bytes(content)
    with pytest.raises(InputError, match=rf"hub: .*{SHARDS[0]} was not downloaded, .*expected nothing .*choose another folder"):
        fetch(tmp_path / "mine")
    assert (tmp_path / "mine" / SHARDS[0]).read_bytes() == content
    assert SHARDS[0] not in server.fetched()


def test_a_downloaded_file_that_a_user_changed_stays(server: Hub, tmp_path: Path) -> None:
    fetch(tmp_path / "model")
    (tmp_path / "model/config.json").write_bytes(b"{ }")
    later = time.time() + 60
    os.utime(tmp_path / "model/config.json", (later, later))
    with pytest.raises(InputError, match=r"hub: .*config\.json was not downloaded, or was changed since"):
        fetch(tmp_path / "model")
    assert (tmp_path / "model/config.json").read_bytes() == b"{ }"


def test_of_many_processes_on_a_node_one_fetches_and_the_first_rank_talks(server: Hub, tmp_path: Path) -> None:
    server.delay_s = 0.3
    ranks = [
        command(server, REPO, "--to", str(tmp_path / "model"), LOCAL_RANK=str(rank), HF_TOKEN="hf_secret") for rank in (0, 1)
    ]
    printed = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert server.fetched() == sorted(NEEDED)
    assert contents(tmp_path / "model") == NEEDED
    assert set(server.tokens) == {"Bearer hf_secret"}
    folder, n_bytes = tmp_path / "model", sum(map(len, NEEDED.values()))
    assert printed[0][0].splitlines() == [
        f"{folder}: {REPO} at c0ffee000000, {len(NEEDED)} files, {n_bytes / 1024:.1f} KiB",
        f"look at it: python -m minitune inspect {folder}",
        f"train it:   python -m minitune PROGRAM.toml model.path={folder}",
    ]
    assert printed[1] == ("", "")
    assert "hf_secret" not in printed[0][1]


def test_the_default_folder_is_named_after_the_repository(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1", "optimizer.pt": b"2"}
    assert download([REPO]).code == 0
    assert contents(tmp_path / "models" / REPO) == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1"}
    assert f"model.deltas=models/{REPO}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repo", "revision", "refusal", "message"),
    [
        ("somebody/else", "main", None, "hub: somebody/else is not at http://127.* or not open to you, expected OWNER/NAME"),
        (REPO, "v9", None, f"hub: {REPO} has no revision 'v9', expected a branch, a tag or a commit"),
        (REPO, "main", (403, "GatedRepo"), f"hub: {REPO} is gated, expected access; accept its terms at http://.*/{REPO}, then"),
        (REPO, "main", (403, "Forbidden"), f"hub: http://.*/{REPO} answered 403, expected its files; set HF_TOKEN to a token"),
        (REPO, "main", (410, "Gone"), "answered 410, expected its files; try again later"),
        ("../../etc", "main", None, r"hub: '\.\./\.\./etc' is no name of a repository, expected OWNER/NAME"),
        ("https://hub/a/b", "main", None, "is no name of a repository"),
        (f"{REPO}--x", "main", None, r"is no name of a repository \(.*\), expected OWNER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    server: Hub, repo: str, revision: str, refusal: tuple[int, str] | None, message: str, tmp_path: Path
) -> None:
    server.refusal = refusal
    with pytest.raises(InputError, match=message) as refused:
        fetch(tmp_path / "model", repo, revision)
    assert "\n" not in str(refused.value)
    assert not contents(tmp_path / "model") if (tmp_path / "model").exists() else True


def test_no_network_is_one_line(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"hub: {REPO} can't be fetched with HF_HUB_OFFLINE set, expected a network; unset it"):
        fetch(tmp_path / "model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"hub: http://127.0.0.1:9/.* can't be reached \(.*\), expected an answer; check the network"
    ):
        fetch(tmp_path / "model")


def test_a_disk_that_is_too_small_is_refused_before_a_weight_is_fetched(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**4, 0, 1000))
    with pytest.raises(
        InputError,
        match=r"model needs 10,243 bytes for the files that are missing, its disk has 1,000 free",
    ):
        fetch(tmp_path / "model")
    assert not set(SHARDS) & set(server.fetched())


@pytest.mark.parametrize(
    "name", ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json", ".evil.json"]
)
def test_a_hostile_name_is_written_nowhere(server: Hub, name: str, tmp_path: Path) -> None:
    server.files = {**NEEDED, name: b"evil"}
    fetch(tmp_path / "model")
    assert contents(tmp_path / "model") == NEEDED
    assert [path.name for path in tmp_path.rglob("*evil*")] == []
    server.files = {**NEEDED, INDEX: json.dumps({"weight_map": {"a": name}}).encode(), name: b"evil"}
    with pytest.raises(InputError, match=rf"{INDEX} of {REPO} points to '.*', expected one of its files"):
        fetch(tmp_path / "other")


PARTS = st.sampled_from(
    ["..", ".", "/", "\\", "C:", "~", "\0", "\n", "*", "[a]", "?", " ", "a", "B-1", "_", "con", ".json", "\u2215", "%2e"]
)


@settings(max_examples=300)
@given(st.lists(PARTS, max_size=5).map("".join))
def test_a_name_that_is_taken_is_a_plain_file_name_everywhere(name: str) -> None:
    if FILE.fullmatch(name):
        assert PurePosixPath(name).name == PureWindowsPath(name).name == name
        assert not name.startswith(".")
        assert fnmatch.fnmatchcase(name, name)  # huggingface_hub takes names for globs
    if hub.REPO.fullmatch(name):
        assert (Path("/models") / name).is_relative_to("/models")
        assert ".." not in name
        assert name.count("/") <= 1


def test_a_repository_without_safetensors_and_a_folder_with_others_are_refused(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=rf"old\.safetensors is no file of {REPO} at this revision, expected none beside them"):
        fetch(tmp_path / "model")
    server.files = {"config.json": b"{}", "pytorch_model.bin": b""}
    with pytest.raises(InputError, match=rf"{REPO} holds config\.json, pytorch_model\.bin, expected model\.safetensors"):
        fetch(tmp_path / "other")
    server.files = {INDEX: b"{"}
    with pytest.raises(InputError, match=r"hub: .*index\.json can't be read \(.*\), expected a JSON object; tell the owner of"):
        fetch(tmp_path / "third")


def test_words_that_do_not_fit_are_refused() -> None:
    for words in ([], ["a", "b"], [REPO, "--into", "x"]):
        with pytest.raises(InputError, match=r"download: .*, expected options as in `.* download --help`; correct the command"):
            download(words)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"huggingface_hub is not installed.*pip install 'minitune\[hf\]'"):
        fetch(tmp_path)
