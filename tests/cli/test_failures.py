"""File systems, homes and disks that refuse: each is one sentence with the path, and an exit code."""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest

from minitune.__main__ import main
from minitune.cli import verbs
from minitune.cli.failures import failure
from minitune.errors import DiskFullError, InputError
from minitune.io import atomic, paths
from support.paths import PACKAGE
from support.programs import ONE_STEP, small_program

PROGRAM = small_program("m", "train.jsonl") + ONE_STEP
LONG = "y" * 300


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small model, eight rows and a program of one step."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PACKAGE / "demo/student", "m")
    rows = (PACKAGE / "demo/orders-train.jsonl").read_text("utf-8").splitlines()
    short = [row for row in rows if len(row) < 420][:8]
    Path("train.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
    Path("t.toml").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """(exit code, what is on stderr, which is one line) of a command."""
    capsys.readouterr()
    code = main(words)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return code, err


def circle(name: str) -> Callable[[], None]:
    """Make a file a link to itself, which no user can open, root included."""

    def change() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).symlink_to(Path(name).name)

    return change


def folder(name: str) -> Callable[[], None]:
    """Put a folder where a file belongs."""

    def change() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir(parents=True)

    return change


def file(name: str) -> Callable[[], None]:
    """Put a file where a folder belongs."""
    return lambda: Path(name).write_text("x", encoding="utf-8") and None


def dangling_run() -> None:
    """Make the run folder a link to nothing."""
    Path("runs").mkdir()
    Path("runs/t").symlink_to("nowhere")


def nothing() -> None:
    """Leave the working folder as it is."""


def written(key: str, value: str) -> Callable[[], None]:
    """Put a line at the top of the program: some characters can't be in an argument."""
    line = f'{key} = "{value}"\n'
    return lambda: Path("t.toml").write_text(line + PROGRAM, encoding="utf-8") and None


RUN, CHECK = ("t.toml",), ("check", "t.toml")
SITUATIONS: list[tuple[Callable[[], None], tuple[str, ...], str]] = [
    (file("runs"), RUN, "places: out 'runs' lies in runs, which is no folder, expected a folder of yours"),
    (file("a"), (*RUN, "out=a/b"), "places: out 'a/b' lies in a, which is no folder, expected a folder of yours"),
    (nothing, (*RUN, "out=/proc/x"), "runs: out '/proc/x' can't be made (No such file or directory)"),
    (nothing, (*RUN, f"out={LONG}"), "yyy' has a name of more than 255 bytes, expected a path"),
    (nothing, (*RUN, "out=~nouser/x"), "~nouser, whose folder is unknown"),
    (written("out", "a\\u0000b"), RUN, "holds a NUL character, expected"),
    (folder("runs/.t.lock"), RUN, "runs/.t.lock"),
    (dangling_run, RUN, "runs/t"),
    (nothing, (*CHECK, f"data.train.path={LONG}"), "yyy' has a name of more than 255 bytes, expected a path"),
    (nothing, (*CHECK, "data.train.path=~nouser/x.jsonl"), "~nouser, whose folder is unknown"),
    (nothing, (*CHECK, "data.train.path=absent.jsonl"), "absent.jsonl"),
    (nothing, (*CHECK, "data.train.path=train.jsonl/x.jsonl"), "train.jsonl/x.jsonl"),
    (folder("train.jsonl"), CHECK, "train.jsonl"),
    (circle("train.jsonl"), CHECK, "train.jsonl"),
    (circle("train.jsonl"), ("show-sample", "t.toml"), "train.jsonl"),
    (nothing, (*CHECK, f"model.path={LONG}"), "yyy"),
    (nothing, (*CHECK, "model.path=~nouser/m"), "~nouser, whose folder is unknown"),
    (nothing, (*CHECK, "model.path=train.jsonl"), "train.jsonl"),
    (folder("m/config.json"), CHECK, "m/config.json"),
    (circle("m/config.json"), CHECK, "m/config.json"),
    (circle("m/tokenizer_config.json"), CHECK, "m/tokenizer_config.json"),
    (circle("m/generation_config.json"), CHECK, "m/generation_config.json"),
    (circle("m/tokenizer.model"), CHECK, "m"),
    (circle("m/chat_template.jinja"), CHECK, "m/chat_template.jinja"),
    (circle("m/model.safetensors"), RUN, "model.safetensors"),
    (folder("m/model.safetensors"), RUN, "model.safetensors"),
    (nothing, ("cp", "lora", "/proc/x.toml"), "minitune: /proc/x.toml: No such file or directory"),
    (nothing, ("cp", "lora", f"{LONG}.toml"), "has a name of more than 255 bytes, expected a path"),
    (nothing, ("cp", "lora", "~nouser/x.toml"), "~nouser, whose folder is unknown"),
    (nothing, ("cp", "lora", "t.toml/x.toml"), "t.toml is no folder, expected one that exists"),
    (nothing, ("x" * 5000,), "has a name of more than 255 bytes"),
    (circle("t.toml"), RUN, "t.toml"),
    (circle("t.toml"), ("show", "t.toml"), "t.toml"),
    (nothing, ("inspect", LONG), "yyy"),
    (nothing, ("inspect", "~nouser"), "~nouser, whose folder is unknown"),
    (nothing, ("chat", LONG), "yyy"),
    (nothing, ("chat", "m", "--deltas", "~nouser/a"), "~nouser, whose folder is unknown"),
    (nothing, ("show-sample", "t.toml", "-n", "9" * 22), "-n is 9999999999999999999999, expected 1 to"),
    (nothing, ("download", "a/b", "--to", "~nouser/m"), "~nouser, whose folder is unknown"),
]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(("change", "words", "message"), SITUATIONS, ids=range(len(SITUATIONS)))
def test_a_place_that_can_not_be_read_or_written_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    change: Callable[[], None],
    words: tuple[str, ...],
    message: str,
) -> None:
    change()
    code, err = ended(capsys, *words)
    assert code == 2
    assert message in err
    assert len(err) < 700


def refusing(name: str, error: OSError) -> Any:
    """Replacement of open() that refuses every file of a name, as a system refuses a user who is not root."""
    open_ = io.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, (str, Path)) and Path(path).name == name:
            raise OSError(error.errno, error.strerror, str(path))
        return open_(path, *args, **kwargs)

    return opened


@pytest.mark.parametrize(
    "name",
    ["t.toml", "train.jsonl", "config.json", "tokenizer.model", "tokenizer_config.json"],
)
@pytest.mark.usefixtures("work")
def test_a_file_without_permission_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened = refusing(name, PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    code, err = ended(capsys, "check", "t.toml")
    assert code == 2
    assert name in err
    assert "Permission denied" in err


@pytest.fixture
def broken_step(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A verb that raises the error which is put into this list."""
    errors: list[BaseException] = []

    def run(words: Any) -> Never:
        raise errors[0]

    monkeypatch.setitem(verbs.VERBS, "ls", verbs.VERBS["ls"]._replace(run=run))
    return errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/t/x"), 3, "minitune: runs/t/x: No space left on device; free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 3, "minitune: x: Disk quota exceeded; free some of your quota"),
        (DiskFullError("io: x does not fit"), 3, "io: x does not fit"),
        (InputError("data: x"), 2, "data: x"),
        (OSError(errno.EIO, "Input/output error"), 2, "minitune: Input/output error; the disk or the network behind it"),
        (OSError(errno.EACCES, "Permission denied", "a", None, "b"), 2, "minitune: a -> b: Permission denied; change"),
        (OSError(errno.EROFS, "Read-only file system", b"a\n"), 2, "minitune: a\\n: Read-only file system; choose"),
        (OSError("tape broke"), 2, "minitune: tape broke; mend what the system says"),
        (TimeoutError(), 2, "minitune: TimeoutError; mend"),
        (ValueError("embedded null byte"), 2, "minitune: a path holds a NUL character"),
        (MemoryError(), 2, "minitune: out of memory (no memory is left); set micro_batch_size = 1"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "minitune: out of memory (DefaultCPU"),
        (RuntimeError("a bug\nof two lines"), 1, "minitune: RuntimeError: a bug: a fault of minitune, not of yours;"),
        (RecursionError(), 1, "minitune: RecursionError: a fault of minitune"),
    ],
)
def test_every_error_is_one_sentence_and_debug_shows_where(
    capsys: pytest.CaptureFixture[str],
    broken_step: list[BaseException],
    error: Exception,
    code: int,
    message: str,
) -> None:
    broken_step.append(error)
    found, err = ended(capsys, "ls")
    assert (found, err.startswith(message)) == (code, True), err
    assert main(["ls", "--debug"]) == code
    trace = capsys.readouterr().err
    assert trace.startswith("Traceback (most recent call last):")
    assert trace.endswith(err)
    assert main(["--debug", "ls"]) == code


def test_a_fault_says_how_to_report_it(capsys: pytest.CaptureFixture[str], broken_step: list[BaseException]) -> None:
    broken_step.append(KeyError("x"))
    code, err = ended(capsys, "ls")
    assert code == 1
    assert "--debug" in err
    assert "report it" in err


def test_an_interrupt_is_silent(capsys: pytest.CaptureFixture[str], broken_step: list[BaseException]) -> None:
    broken_step.append(KeyboardInterrupt())
    assert main(["ls"]) == 130
    assert capsys.readouterr().err == ""


def test_a_long_path_is_cut_in_the_middle() -> None:
    message = failure(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000 + "z")).message
    assert len(message) < 400
    assert "aaa ... aaa" in message
    assert "z: File name too long" in message


def test_a_full_disk_met_by_a_save_has_its_own_exit_code(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="does not fit on its disk") as caught, atomic.atomic_file(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failure(caught.value).code == 3


@pytest.mark.parametrize("place", ["absent", "file", "/proc/x", "read-only"])
@pytest.mark.usefixtures("work")
def test_a_cache_that_can_not_be_written_gives_way_to_a_temporary_one_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    if place == "absent":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a number without a name, as containers have
    elif place == "read-only":
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: "cache" not in str(path) and access(path, mode))
    else:
        file("file")()
        monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert main(["t.toml"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "the usual cache can't be used (" in out
    assert f"tokenized data is in {paths.cache()}; XDG_CACHE_HOME names another place" in out
    assert paths.cache().parent == spare
    assert paths.cache().stat().st_mode & 0o777 == 0o700
    assert any(paths.cache().rglob("*.npy"))


def test_a_temporary_cache_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"minitune-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not yours, expected your own; set XDG_CACHE_HOME"):
        paths.cache()


def test_the_usual_cache_is_used_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache() == tmp_path / "minitune"
    assert paths.cache_note() is None


def test_a_folder_demo_of_the_user_is_found_where_nothing_is_embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("demo/mine.jsonl").write_text("{}", encoding="utf-8")
    assert paths.locate("demo/mine.jsonl") == Path("demo/mine.jsonl")
    assert paths.locate("demo/absent.jsonl") == PACKAGE / "demo/absent.jsonl"
    assert paths.locate("demo/orders-train.jsonl") == PACKAGE / "demo/orders-train.jsonl"
