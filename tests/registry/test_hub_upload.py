"""Uploads to a server of our own that takes them as the Hub does."""

import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from minitune.errors import InputError
from minitune.registry.hub_upload import Target, Uploaded, upload
from support.hub_repositories import TOKEN
from support.hub_server import Hub

MINE = "somebody/orders"
ORDERS = Target(MINE)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "README.md": b"---\nlibrary_name: transformers\n---\n# Orders\n",
    "tokenizer.json": b'{"version": "1.0"}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 37,
    "model-00002-of-00002.safetensors": bytes(1001),
}


@pytest.fixture(autouse=True)
def token(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def folder_of(folder: Path, files: dict[str, bytes]) -> dict[str, Path | bytes]:
    """Files of a folder that holds them, by name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


def sent(folder: Path, files: dict[str, bytes], *, target: Target = ORDERS) -> tuple[Uploaded, list[str]]:
    lines: list[str] = []
    return upload(target, folder_of(folder, files), "Upload", lines.append), lines


def test_what_is_uploaded_is_what_lies_there(server: Hub, tmp_path: Path) -> None:
    done, lines = sent(tmp_path / "model", FILES)
    repository = server.repositories.by_name[MINE]
    stored = {name: data for name, data in repository.files().items() if name != ".gitattributes"}
    assert stored == FILES
    assert not repository.private
    assert (done.commit, done.n_sent) == (repository.branches["main"], 5)
    assert done.address == f"{server.url}/{MINE}"
    assert lines == [f"hub: {MINE}: 5 of 5 files to send, {sum(map(len, FILES.values())) / 1024:.1f} KiB"]


def test_only_what_changed_is_sent_and_old_weights_go(server: Hub, tmp_path: Path) -> None:
    first, _ = sent(tmp_path / "model", FILES)
    again, lines = sent(tmp_path / "model", FILES)
    assert (again.commit, again.n_sent, lines) == (first.commit, 0, [f"hub: {MINE} has these files already"])
    assert len(server.repositories.by_name[MINE].commits) == 2
    kept = {name: data for name, data in FILES.items() if not name.endswith("of-00002.safetensors")}
    third, lines = sent(tmp_path / "model", {**kept, "model.safetensors": b"one file"})
    assert third.n_sent == 1
    assert len(server.repositories.stored) == 4  # tokenizer.json, two shards, the one file
    assert [line for line in lines if "is of an earlier upload and goes" in line] == [
        f"hub: {MINE}: {name} is of an earlier upload and goes" for name in FILES if "-of-" in name
    ]
    stored = server.repositories.by_name[MINE].files()
    assert set(stored) == {".gitattributes", *kept, "model.safetensors"}


def test_a_single_file_leaves_those_beside_it(server: Hub, tmp_path: Path) -> None:
    sent(tmp_path / "model", FILES)
    sent(tmp_path / "other", {"model-q8.gguf": b"GGUF"})
    assert set(server.repositories.by_name[MINE].files()) == {".gitattributes", *FILES, "model-q8.gguf"}


def test_an_upload_that_broke_goes_on_with_what_is_missing(server: Hub, tmp_path: Path) -> None:
    server.repositories.broken_after = 2
    with pytest.raises(InputError, match=rf"hub: http://.*/{MINE} answered 403, expected it to take files; set HF_TOKEN"):
        sent(tmp_path / "model", FILES)
    assert len(server.repositories.by_name[MINE].commits) == 1  # all or nothing
    before, server.repositories.broken_after = list(server.repositories.stored), None
    sent(tmp_path / "model", FILES)
    assert len(before) == 2
    assert len(server.repositories.stored) == len(set(server.repositories.stored)) == 3


def test_a_private_repository_and_another_branch(server: Hub, tmp_path: Path) -> None:
    sent(tmp_path / "model", FILES, target=Target("their-team/orders", private=True))
    repository = server.repositories.by_name["their-team/orders"]
    assert repository.private
    repository.branches["trial"] = repository.branches["main"]
    sent(tmp_path / "model", {**FILES, "config.json": b"{}"}, target=Target("their-team/orders", "trial"))
    assert repository.files("trial")["config.json"] == b"{}"
    assert repository.files("main") == {".gitattributes": repository.files("main")[".gitattributes"], **FILES}


REFUSED = {
    "no name": (Target("orders"), "'orders' is no name of a repository, expected OWNER/NAME; correct it"),
    "another's": (
        Target("else/orders"),
        "else/orders is of else, and your token of somebody, expected one of somebody, their-team before the slash; choose",
    ),
    "revision": (Target(MINE, "v9"), f"{MINE} has no revision 'v9', expected a branch, a tag or a commit"),
    "new and revision": (Target("somebody/new", "v9"), "somebody/new does not exist yet, so that it has no revision 'v9'"),
    "public": (Target(MINE, private=True), f"{MINE} exists and is public, expected a private one; make it private"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_place_that_takes_no_upload_is_refused_and_nothing_is_made(name: str, server: Hub, tmp_path: Path) -> None:
    sent(tmp_path / "model", FILES)
    target, message = REFUSED[name]
    with pytest.raises(InputError, match=f"^hub: {message}"):
        sent(tmp_path / "model", {"config.json": b"{}"}, target=target)
    assert set(server.repositories.by_name) == {MINE}
    assert len(server.repositories.by_name[MINE].commits) == 2


def test_a_token_that_may_not_write_is_one_sentence(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories.role = "read"
    with pytest.raises(InputError, match="hub: the token of somebody may only read, expected one that may write; set HF_TOKEN"):
        sent(tmp_path / "model", FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match=r"hub: .* answered 401, expected it to take files; set HF_TOKEN to a token that may"):
        sent(tmp_path / "model", FILES)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=f"hub: no token for {MINE}, expected one that may write; set HF_TOKEN to a token"):
        sent(tmp_path / "model", FILES)
    assert not server.repositories.by_name


def test_no_network_is_one_line(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"hub: {MINE} can't be written with HF_HUB_OFFLINE set, expected a network; unset it"):
        sent(tmp_path / "model", FILES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"hub: http://127.0.0.1:9/.* can't be reached \(.*\), expected an answer; check"):
        sent(tmp_path / "model", FILES)


def test_what_the_hub_says_of_a_card_is_told(server: Hub, tmp_path: Path) -> None:
    server.repositories.advice = ["empty or missing\nlicense"]
    _, lines = sent(tmp_path / "model", FILES)
    assert lines[-1] == "hub: Warnings while validating metadata in README.md: - empty or missing license"
    server.repositories.faults = ['"base_model" is no name']
    with pytest.raises(InputError, match=rf"hub: {MINE} refuses README.md \(Invalid metadata .*is no name\), expected a head"):
        sent(tmp_path / "model", {**FILES, "README.md": b"---\nbase_model: models/x\n---\n"})
