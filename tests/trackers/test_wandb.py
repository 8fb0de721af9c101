"""Weights & Biases before a run: every wrong setting is one sentence, and no folder is made."""

import inspect
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.trackers import reach
from minitune.trackers import wandb as wandb_tracker
from minitune.trackers.wandb import WandbConfig
from support.programs import small_program

PROGRAM = small_program() + '[log]\nwandb = { project = "p" }\n'
KEY = "a" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user without a key, in a folder with a program."""
    for name in (*wandb_tracker.KEYS, "NETRC", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(PROGRAM, encoding="utf-8")
    yield tmp_path
    import wandb

    wandb.teardown()  # it keeps what it read of the environment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log.wandb.mode=ofline", "program: 'log.wandb.mode=ofline' on the command line: log.wandb.mode is \"ofline\""),
        ("log.wandb.mode=ofline", "expected one of disabled, offline, online, shared; did you mean 'offline'?"),
        ("log.wandb.tags=3", "log.wandb.tags is 3, expected array"),
        ("log.wandb.projct=x", "log.wandb.projct is unknown, expected one of"),
        ("log.wandb.projct=x", "did you mean 'project'?"),
        ("log.wandb.config=x", 'log.wandb.config is "x", expected table'),
        ("log.wandb.project=a/b", "log: wandb says: Invalid project name 'a/b'"),
        ("log.wandb.id=a/b", "log: wandb says: Run ID cannot contain the characters"),
        ("log.wandb.mode=online", "has no API key for "),
        ("log.wandb.mode=online", 'expected one; run `wandb login`, set WANDB_API_KEY, or set log.wandb.mode = "offline"'),
    ],
)
@pytest.mark.parametrize("verb", [("check",), ()])
def test_a_wrong_setting_is_one_sentence_before_a_folder_is_made(
    capsys: pytest.CaptureFixture[str], verb: tuple[str, ...], override: str, message: str
) -> None:
    assert main([*verb, "t.toml", override]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('projct = "p"', "log.wandb.projct is unknown, expected one of"),
        ("entity = 3", "log.wandb.entity is 3, expected str"),
        ('config = "x"', 'log.wandb.config is "x", expected table'),
    ],
)
def test_a_wrong_key_of_the_file_names_its_line(capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    Path("t.toml").write_text(PROGRAM.replace('project = "p"', text), encoding="utf-8")
    assert main(["check", "t.toml"]) == 2
    assert capsys.readouterr().err.startswith(f"program: t.toml:15: {message}")


def test_a_key_that_wandb_refuses_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.delenv("WANDB_MODE")  # which the tests set to offline
    monkeypatch.setattr(wandb_tracker, "unreachable", lambda address: None)
    with pytest.raises(InputError, match=r"log: wandb says: .*API key must have 40\+ characters, has 5; correct \[log\] wandb"):
        WandbConfig(mode="online").check()


def test_a_server_out_of_reach_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def refused(address: object, timeout: float) -> socket.socket:
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(InputError, match=r"the server of wandb, can't be reached \(no such host\), expected a network; mend"):
        WandbConfig(mode="online").check()


def test_a_proxy_is_left_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert reach.unreachable("https://nowhere.invalid") is None


def test_a_key_in_the_file_of_passwords_is_found(nobody: Path) -> None:
    assert not wandb_tracker._has_key("api.example")
    (nobody / ".netrc").write_text(f"machine api.example login user password {KEY}\n", encoding="utf-8")
    (nobody / ".netrc").chmod(0o600)
    assert wandb_tracker._has_key("api.example")
    assert not wandb_tracker._has_key("other.example")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_server_no_key_is_needed(mode: wandb_tracker.Mode) -> None:
    WandbConfig(project="p", mode=mode).check()


def test_every_key_is_a_keyword_of_wandb() -> None:
    import wandb

    assert set(WandbConfig.__struct_fields__) - {"artifacts"} <= set(inspect.signature(wandb.init).parameters)
    assert WandbConfig(project="p", tags=["a"]).keywords() == {"project": "p", "tags": ["a"]}
    assert msgspec.convert({}, WandbConfig).keywords() == {}


def test_a_run_that_can_not_upload_ends_in_time_and_says_how_to_send_it_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = WandbConfig(mode="offline").start(tmp_path, {"name": "t"})
    assert (run._run.settings.finish_timeout, run._run.settings.finish_timeout_raises) == (30.0, True)
    finish, folder = run._run.finish, Path(run._run.dir).parent

    def late(exit_code: int) -> None:
        finish(exit_code=exit_code)
        raise TimeoutError("Timed out finishing run.")  # as wandb does

    monkeypatch.setattr(run._run, "finish", late)
    said = f"what is left was not uploaded in time and lies in {folder}; `wandb sync {folder}` sends it"
    with pytest.raises(TimeoutError, match=re.escape(said)):
        run.finish(failed=False)
    assert list(folder.glob("*.wandb"))

    other = WandbConfig(mode="offline", settings={"finish_timeout": 5.0}).start(tmp_path, {"name": "t"})
    assert other._run.settings.finish_timeout == 5.0
    other.finish(failed=False)
