"""Weights & Biases before a run: every wrong setting is one sentence, and no folder is made."""

import inspect
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.programs import wandb_tracker
from minitune.programs.wandb_tracker import WandbConfig, check
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
    monkeypatch.setattr(wandb_tracker, "_unreachable", lambda host, port: None)
    with pytest.raises(InputError, match=r"log: wandb says: .*API key must have 40\+ characters, has 5; correct \[log\] wandb"):
        check(WandbConfig(mode="online"))


def test_a_server_out_of_reach_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def refused(address: object, timeout: float) -> socket.socket:
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(InputError, match=r"the server of wandb, can't be reached \(no such host\), expected a network; mend"):
        check(WandbConfig(mode="online"))


def test_a_proxy_is_left_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert wandb_tracker._unreachable("nowhere.invalid", 443) is None


def test_a_key_in_the_file_of_passwords_is_found(nobody: Path) -> None:
    assert not wandb_tracker._has_key("api.example")
    (nobody / ".netrc").write_text(f"machine api.example login user password {KEY}\n", encoding="utf-8")
    (nobody / ".netrc").chmod(0o600)
    assert wandb_tracker._has_key("api.example")
    assert not wandb_tracker._has_key("other.example")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_server_no_key_is_needed(mode: wandb_tracker.Mode) -> None:
    check(WandbConfig(project="p", mode=mode))
    check(None)


def test_every_key_is_a_keyword_of_wandb() -> None:
    import wandb

    assert set(WandbConfig.__struct_fields__) <= set(inspect.signature(wandb.init).parameters)
    assert WandbConfig(project="p", tags=["a"]).keywords() == {"project": "p", "tags": ["a"]}
    assert msgspec.convert({}, WandbConfig).keywords() == {}


def test_a_tracker_that_breaks_ends_no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = wandb_tracker.WandbRun(tmp_path, WandbConfig(mode="disabled"), {"name": "t"})

    def broken(*args: object, **keywords: object) -> None:
        raise BrokenPipeError("the service is gone.")

    monkeypatch.setattr(run._run, "log", broken)
    monkeypatch.setattr(run._run, "finish", broken)
    assert run.log(1, {"loss": 1.0}) == "the service is gone"
    assert run.finish(0) == "the service is gone"


def test_a_run_that_can_not_upload_ends_in_time_and_says_how_to_send_it_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = wandb_tracker.WandbRun(tmp_path, WandbConfig(mode="offline"), {"name": "t"})
    assert (run._run.settings.finish_timeout, run._run.settings.finish_timeout_raises) == (30.0, True)
    finish, folder = run._run.finish, Path(run._run.dir).parent

    def late(exit_code: int) -> None:
        finish(exit_code=exit_code)
        raise TimeoutError("Timed out finishing run.")  # as wandb does

    monkeypatch.setattr(run._run, "finish", late)
    said = f"what is left was not uploaded in time and lies in {folder}; `wandb sync {folder}` sends it"
    assert run.finish(0) == said
    assert list(folder.glob("*.wandb"))

    own = WandbConfig(mode="offline", settings={"finish_timeout": 5.0})
    other = wandb_tracker.WandbRun(tmp_path, own, {"name": "t"})
    assert other._run.settings.finish_timeout == 5.0
    assert other.finish(0) is None
