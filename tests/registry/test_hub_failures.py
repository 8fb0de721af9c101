"""Every way in which a download fails is one sentence and an exit code, and the same command goes on where it stopped."""

import signal
import subprocess
import threading
from pathlib import Path

import pytest

from support.hub_server import NEEDED, REPO, SHARDS, Hub, command, contents
from support.small_disks import fill, small_disk

NOBODY = "http://127.0.0.1:9"


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what is on stderr after the line on what there is to fetch)."""
    _, err = process.communicate()
    lines = [line for line in err.splitlines() if " files to fetch, " not in line]
    assert len(lines) <= 1, err
    return process.returncode, "".join(lines)


CASES = {
    "no such host": ({}, {"HF_ENDPOINT": "http://no.such.host.invalid"}, r"can't be reached (["),
    "nobody there": ({}, {"HF_ENDPOINT": NOBODY}, "can't be reached ([Errno 111] Connection refused), expected an answer; check"),
    "a dead proxy": ({}, {"HTTP_PROXY": NOBODY, "http_proxy": NOBODY}, "can't be reached ("),
    "no URL": ({}, {"HF_ENDPOINT": "nonsense"}, "can't be reached (Request URL is missing an 'http://'"),
    "offline": ({}, {"HF_HUB_OFFLINE": "1"}, "can't be fetched with HF_HUB_OFFLINE set, expected a network; unset it"),
    "gated": ({"refusal": (403, "GatedRepo")}, {}, "is gated, expected access; accept its terms at"),
    "no access": ({"refusal": (401, "")}, {}, "answered 401, expected its files; set HF_TOKEN to a token that may read it"),
    "broken": ({"api_status": 500}, {}, "answered 500, expected its files; try again later"),
    "overloaded": ({"api_status": 429}, {}, "answered 429, expected its files; try again later"),
    "silent": ({"delay_s": 3.0}, {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, "can't be reached (timed out), expected an answer"),
    "damaged": ({"damaged": {SHARDS[0]}}, {}, f"{SHARDS[0]} arrived with another SHA-256 than {REPO} lists, expected the same"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_one_sentence(name: str, server: Hub, tmp_path: Path) -> None:
    faults, env, message = CASES[name]
    for field, value in faults.items():
        setattr(server, field, value)
    code, err = ended(command(server, REPO, "--to", str(tmp_path / "model"), **env))
    assert (code, err[:5]) == (2, "hub: ")
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("somebody/tiny-modle",), f"or not open to you, expected OWNER/NAME of a model; did you mean '{REPO}'?"),
        (("sombody/tiny-model",), f"; did you mean '{REPO}'?"),
        (("nobody/else",), "expected OWNER/NAME of a model; correct the name, or set HF_TOKEN"),
        ((REPO, "--revision", "v9"), f"{REPO} has no revision 'v9', expected a branch, a tag or a commit"),
    ],
)
def test_an_unknown_name_is_answered_by_those_near(words: tuple[str, ...], message: str, server: Hub, tmp_path: Path) -> None:
    code, err = ended(command(server, *words, "--to", str(tmp_path / "model")))
    assert (code, message in err) == (2, True), err


def test_a_damaged_file_does_not_stay_and_is_fetched_again(server: Hub, tmp_path: Path) -> None:
    server.damaged = {SHARDS[1]}
    assert ended(command(server, REPO, "--to", str(tmp_path / "model")))[0] == 2
    assert set(contents(tmp_path / "model")) == {*NEEDED} - {SHARDS[1]}
    server.damaged, server.log[:] = set(), []
    assert ended(command(server, REPO, "--to", str(tmp_path / "model"))) == (0, "")
    assert contents(tmp_path / "model") == NEEDED
    assert server.fetched() == [SHARDS[1]]


def test_a_connection_that_breaks_goes_on_where_it_broke(server: Hub, tmp_path: Path) -> None:
    """huggingface_hub writes 10 MiB at a time."""
    server.cut_after = 11 * 2**20
    server.files = {**NEEDED, SHARDS[0]: bytes(range(256)) * 12 * 2**12}
    assert ended(command(server, REPO, "--to", str(tmp_path / "model"))) == (0, "")
    assert contents(tmp_path / "model") == server.files
    assert server.resumed == [10 * 2**20]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_download_that_was_stopped_goes_on_with_the_files_that_are_missing(number: int, server: Hub, tmp_path: Path) -> None:
    held = threading.Event()
    server.hold = (SHARDS[0], held)
    process = command(server, REPO, "--to", str(tmp_path / "model"))
    assert server.asked.wait(60), process.communicate()
    process.send_signal(number)
    process.communicate()
    held.set()
    assert process.returncode == -number  # at once, while it waits for the server
    server.hold = None
    server.log.clear()
    assert ended(command(server, REPO, "--to", str(tmp_path / "model"))) == (0, "")
    assert contents(tmp_path / "model") == NEEDED
    assert SHARDS[0] in server.fetched()
    assert "config.json" not in server.fetched()


def test_a_disk_that_fills_up_midway_has_its_exit_code(server: Hub, tmp_path: Path) -> None:
    """The room is there when the download begins, and gone when the weights come."""
    with small_disk(tmp_path / "small", 256) as disk:
        server.files = {**NEEDED, SHARDS[0]: bytes(100_000)}
        held = threading.Event()
        server.hold = (SHARDS[0], held)
        process = command(server, REPO, "--to", str(disk / "model"))
        assert server.asked.wait(60), process.communicate()
        other = fill(disk)
        held.set()
        code, err = ended(process)
        assert code == 3
        assert err.startswith("hub: the disk of ")
        assert " is full, expected room for somebody/tiny-model; free some space" in err
        other.unlink()
        assert ended(command(server, REPO, "--to", str(disk / "model"))) == (0, "")
        assert contents(disk / "model") == server.files
