"""Folders that people point at where a model is asked for: a run folder, an adapter, a model."""

from pathlib import Path
from typing import NamedTuple

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.io.paths import locate

ADAPTER_CONFIG = "adapter_config.json"
RUN_FILES = ("manifest.json", "program.toml")


class ModelFolder(NamedTuple):
    """Paths as a program would write them: of a model, and of an adapter to put on it."""

    model: str
    adapter: str | None
    note: str | None  # for the user, if this is not the folder that was named


def is_run(folder: Path) -> bool:
    """True for a run folder."""
    return all((folder / name).is_file() for name in RUN_FILES)


def result_of(word: str, verb: str) -> str:
    """Folder that a run saved: its model, else its adapter; a word that is no run is returned.

    InputError for a run that has saved none yet, or several of the same kind.
    """
    run = locate(word)
    if not is_run(run):
        return word
    for name in ("config.json", ADAPTER_CONFIG):
        found = sorted(path.parent for path in run.glob(f"*/{name}"))
        if len(found) > 1:
            names = ", ".join(str(path) for path in found)
            raise InputError(f"{verb}: {word} is a run that saved {names}, expected one; name it")
        if found:
            return str(found[0])
    found = f"{word} is a run that has saved no model yet"
    raise InputError(f"{verb}: {found}, expected one with a save stage; let it finish")


def open_model_folder(word: str, adapter: str | None, verb: str) -> ModelFolder:
    """Model and adapter that a word means: a model, a run's result, or an adapter with its base.

    InputError for an adapter whose base is not on this machine.
    """
    folder = result_of(word, verb)
    config = locate(folder) / ADAPTER_CONFIG
    if adapter is not None or not config.is_file():
        return ModelFolder(folder, adapter, folder if folder != word else None)
    base = read_json_object(config, verb).get("base_model_name_or_path")
    if not isinstance(base, str) or not locate(base).is_dir():
        raise InputError(
            f"{verb}: {folder} is an adapter on {base}, no folder here, expected its base; "
            f"write {verb} BASE_FOLDER --deltas {folder}"
        )
    return ModelFolder(base, folder, f"{folder} on {base}")
