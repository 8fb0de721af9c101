"""A program never writes where it reads, where it runs or where another of its stages writes; check says so beforehand."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from minitune import __main__
from minitune.data.source import MixtureComponent, Source
from minitune.errors import InputError
from minitune.io import results
from minitune.programs import program, save_paths
from minitune.programs.loading import ModelSource
from minitune.programs.program import Program
from minitune.programs.run_folder import open_run
from minitune.programs.stages.stage import Stage


def saving(*paths: str | None, kind: str = "save") -> tuple[Any, ...]:
    keys = {"what": "merged"} if kind == "save" else {"format": "gguf"}
    tables = [{"op": kind, "name": f"stage{i}", "path": path, **keys} for i, path in enumerate(paths)]
    return tuple(msgspec.convert(tables, list[Stage]))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A working folder with a model, data, notes and a program that saves."""
    monkeypatch.chdir(tmp_path)
    for name in ("models/m", "notes", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    for name in ("train.jsonl", "mixed.jsonl", "part-1.jsonl", "part-2.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n', encoding="utf-8")
    source = Source(path="train.jsonl", format="text", seq_len=5, mix=(MixtureComponent("mixed.jsonl", 0.5),))
    parts = Source(path="part-*.jsonl", format="text", seq_len=5)
    return Program(
        name="t", model=ModelSource(path="models/m", deltas="adapter"), data={"train": source, "parts": parts}, stage=saving(None)
    )


def test_files_of_a_pattern_and_of_a_list_are_read_and_never_written_over(tiny: Program) -> None:
    source = Source(path=("*.jsonl",), format="text", seq_len=5)
    listed = msgspec.structs.replace(tiny, data={"train": source}, stage=saving("mixed.jsonl"))
    with pytest.raises(InputError, match=r"is also data\.train\.path\[0\] \(mixed\.jsonl\)"):
        save_paths.check(listed)


def test_a_place_that_cannot_be_written_is_found_before_the_run(tiny: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    save_paths.check(msgspec.structs.replace(tiny, out="new/runs", stage=saving("also/new/x")))
    with pytest.raises(InputError, match=r"out 'train.jsonl/runs' lies in train.jsonl, which is no folder, expected a folder"):
        save_paths.check(msgspec.structs.replace(tiny, out="train.jsonl/runs"))
    # The superuser may write everywhere, so that modes show nothing to it.
    monkeypatch.setattr(save_paths.os, "access", lambda place, mode: place.name != "models")
    with pytest.raises(InputError, match=r"stage0 path 'models/new/x' lies in models, which can't be written"):
        save_paths.check(msgspec.structs.replace(tiny, stage=saving("models/new/x")))


REFUSED = {
    "the model folder": ("models/m", r"stage0 path 'models/m' is also model\.path \(models/m\), expected a place of its own"),
    "the model folder by a longer way": ("models/../models/m/", r"is also model\.path"),
    "around the model folder": ("models", r"holds model\.path"),
    "inside the model folder": ("models/m/merged", r"lies inside model\.path"),
    "the adapter": ("adapter", r"is also model\.deltas"),
    "the data file": ("train.jsonl", r"is also data\.train\.path"),
    "a file of a pattern": ("part-2.jsonl", r"is also data\.parts\.path \(part-2\.jsonl\)"),
    "a mixed file": ("mixed.jsonl", r"is also data\.train\.mix\[0\]\.path"),
    "inside the data file": ("train.jsonl/out", r"lies inside data\.train\.path"),
    "notes": ("notes", r"results: notes holds config\.json, which no save stage wrote"),
    "the working folder": (".", r"holds model\.path"),
    "around the working folder": ("..", r"holds model\.path"),
    "the run folder": ("run", r"is or holds the run folder"),
    "the run folder's own path": ("runs/t", r"is or holds the run folder"),
    "around the run folder": ("runs", r"is or holds the run folder"),
    "out of the run folder": ("run/..", r"is or holds the run folder"),
    "checkpoints": ("run/checkpoints", r"is or lies in checkpoints of the run folder"),
    "checkpoints in other letters": ("run/Checkpoints/train", r"is or lies in Checkpoints of the run folder"),
    "checkpoints by their own path": ("runs/t/checkpoints/train", r"is or lies in checkpoints of the run folder"),
    "the run's rows": ("run/metrics.jsonl", r"is or lies in metrics\.jsonl of the run folder"),
    "the lock": ("runs/.t.lock", r"is or holds the run's lock"),
}


@pytest.mark.parametrize(("path", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", ["save", "export"])
def test_a_stage_that_would_write_over_something_is_refused(kind: str, path: str, message: str, tiny: Program) -> None:
    program = msgspec.structs.replace(tiny, stage=saving(path, kind=kind))
    message = message if kind == "save" or "results" not in message else "results: notes is no file"
    with pytest.raises(InputError, match=message):
        save_paths.check(program)
    absolute = path if path.startswith("run/") or path == "run" else str(Path(path).absolute())
    with pytest.raises(InputError, match=message.partition(r"'models/m'")[2] or message.partition("notes")[2] or message):
        save_paths.check(msgspec.structs.replace(program, stage=saving(absolute, kind=kind)))


def test_a_link_to_an_input_is_that_input(tiny: Program, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "models", target_is_directory=True)
    with pytest.raises(InputError, match=r"is also model\.path"):
        save_paths.check(msgspec.structs.replace(tiny, stage=saving("link/m")))
    with pytest.raises(InputError, match=r"holds model\.path"):
        save_paths.check(msgspec.structs.replace(tiny, stage=saving("link")))


@pytest.mark.parametrize("path", [None, "run/out", "runs/t/out", "out", "models/new", "deep/down/out", "runs/t.2"])
def test_a_place_of_its_own_is_allowed(path: str | None, tiny: Program) -> None:
    save_paths.check(msgspec.structs.replace(tiny, stage=saving(path)))


def test_an_earlier_save_is_allowed_until_a_user_puts_a_file_there(tiny: Program, tmp_path: Path) -> None:
    program = msgspec.structs.replace(tiny, stage=saving("out"))
    with results.result_folder(tmp_path / "out") as aside:
        (aside / "model.safetensors").write_bytes(b"weights")
    save_paths.check(program)
    (tmp_path / "out" / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"results: out holds README\.md, which no save stage wrote"):
        save_paths.check(program)


def test_a_save_that_is_read_again_is_not_written_over(tiny: Program, tmp_path: Path) -> None:
    with results.result_folder(tmp_path / "out") as aside:
        (aside / "model.safetensors").write_bytes(b"weights")
    program = msgspec.structs.replace(tiny, model=ModelSource(path="out"), stage=saving("out"))
    with pytest.raises(InputError, match=r"is also model\.path"):
        save_paths.check(program)


@pytest.mark.parametrize(
    ("paths", "relation"), [(("out", "out"), "is also"), ((None, None), "is also"), (("out", "out/in"), "lies inside")]
)
def test_two_stages_write_to_two_places(paths: tuple[str | None, ...], relation: str, tiny: Program) -> None:
    with pytest.raises(InputError, match=rf"places: stage1 path .* {relation} stage0 path"):
        save_paths.check(msgspec.structs.replace(tiny, stage=saving(*paths)))


def test_answers_do_not_take_the_place_of_the_runs_own_files(tiny: Program) -> None:
    stage = msgspec.convert([{"op": "generate", "name": "metrics", "data": "train"}], list[Stage])
    with pytest.raises(InputError, match=r"places: metrics path .* is or lies in metrics\.jsonl of the run folder"):
        save_paths.check(msgspec.structs.replace(tiny, stage=tuple(stage)))


def test_check_and_run_refuse_before_a_folder_is_made(
    tiny: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '[model]\npath = "demo"\n[[stage]]\nop = "save"\nwhat = "params"\npath = "notes"\n'
    (tmp_path / "t.toml").write_text(f'name = "t"\n{text}', encoding="utf-8")
    for words in (["check", "t.toml"], ["t.toml"]):
        assert __main__.main(words) == 2
        assert "results: notes holds config.json, which no save stage wrote" in capsys.readouterr().err
    assert (tmp_path / "notes/config.json").read_text(encoding="utf-8") == "{}"
    assert not (tmp_path / "runs").exists()


def test_a_changed_mixed_file_is_told_when_a_run_goes_on(tiny: Program, tmp_path: Path) -> None:
    (tmp_path / "models/m/model.safetensors").write_bytes(b"weights")
    opened = open_run(program.WrittenProgram(tiny))
    opened.lock.close()
    (tmp_path / "mixed.jsonl").write_text('{"text": "y"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"runs: mixed\.jsonl is not what it was"):
        open_run(program.WrittenProgram(tiny))
