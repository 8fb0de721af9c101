"""Folders that people point at where a model is asked for: a run folder, an adapter, a model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minitune.errors import InputError
from minitune.io.graph_files import graph_of
from minitune.io.json_file import read_json_object
from minitune.io.paths import is_registered_name, locate
from minitune.io.toml_writing import inline_text
from minitune.programs.trained_state import TrainedState, heldout_table, is_run, trained_state
from minitune.registry.names import spelled_out
from minitune.registry.opened import bring

ADAPTER_CONFIG = "adapter_config.json"
# Shipped programs that ask a model about rows, and the table that these are.
EVALUATING = {"eval": "heldout", "generate": "prompts"}
# Verbs for which a graph of another runtime stands for a run that saved nothing else.
TAKING_GRAPHS = ("verify", "register", "upload")


def bring_registered(word: str) -> str:
    """Word after what it names was fetched, where it is the name of a registered model: with its
    registry, mlflow:NAME for a bare NAME. Any other word as it is.

    InputError as registry.opened.bring raises it.
    """
    name = spelled_out(word)
    if not is_registered_name(name):
        return word

    def tell(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    opened = bring(name, tell)
    tell(f"{opened.words} is in {opened.folder}")
    return name


class ModelFolder(NamedTuple):
    """Paths as a program would write them: of a model, and of an adapter to put on it."""

    model: str
    adapter: str | None
    note: str | None  # for the user, if this is not the folder that was named


def result_of(word: str, verb: str) -> str | TrainedState:
    """Folder that a finished run saved: its model, else its adapter; of one that is not finished,
    its newest training state. A word that is no run is returned.

    InputError for a run that has saved nothing yet, or several of the same kind.
    """
    if not locate(word).is_dir():
        word = bring_registered(word)
    place = locate(word)
    if not is_run(place):
        return trained_state(place) or word
    is_finished = (place / "summary.json").is_file()
    state = trained_state(place)
    if state is not None and not is_finished:
        return state
    for name in ("config.json", ADAPTER_CONFIG):
        found = sorted(path.parent for path in place.glob(f"*/{name}"))
        found = [folder for folder in found if graph_of(folder) is None]
        if len(found) > 1:
            # an export beside the dense folder is for inference elsewhere
            found = [folder for folder in found if not _is_quantized(folder / name)] or found
        if found:
            return _only(found, word, verb)
    graphs = sorted(path.parent for path in place.glob("*/config.json"))
    if graphs and verb in TAKING_GRAPHS:
        return _only(graphs, word, verb)
    if state is not None:
        return state
    found = f"{word} is a run that has saved no model yet"
    raise InputError(f"{verb}: {found}, expected a training state or a save stage; let it go on")


def _only(found: Sequence[Path], word: str, verb: str) -> str:
    """Path of the one folder that was found; InputError for several."""
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise InputError(f"{verb}: {word} is a run that saved {names}, expected one; name it")
    return str(found[0])


def _is_quantized(config: Path) -> bool:
    """True for the config.json of a folder of quantized weights."""
    return "quantization_config" in read_json_object(config, "models")


def open_model_folder(word: str, adapter: str | None, verb: str) -> ModelFolder:
    """Model and adapter that a word means: a model, a run's result or newest state, or an adapter
    with its base.

    InputError for an adapter whose base is not on this machine.
    """
    result = result_of(word, verb)
    if isinstance(result, TrainedState):
        if adapter is not None:
            found = f"{word} has deltas of its own"
            raise InputError(f"{verb}: {found}, expected a model; drop --deltas")
        return ModelFolder(result.base, str(result.folder), f"{result.describe()} on {result.base}")
    config = locate(result) / ADAPTER_CONFIG
    if adapter is not None or not config.is_file():
        return ModelFolder(result, adapter, result if result != word else None)
    base = base_of(config, verb)
    if base is None or not locate(base).is_dir():
        remedy = f"write {verb} BASE_FOLDER --deltas {result}"
        wanted = "no folder here, expected its base"
        raise InputError(f"{verb}: {result} is an adapter on {base}, {wanted}; {remedy}")
    return ModelFolder(base, result, f"{result} on {base}")


def require_folder(word: str, verb: str, expected: str) -> str:
    """Word as bring_registered gives it; InputError if it is no folder that is here. expected: what
    the verb works on."""
    word = bring_registered(word)
    place = locate(word)
    if not place.is_dir():
        found = "is a file" if place.exists() else "does not exist"
        raise InputError(f"{verb}: {word} {found}, expected {expected}; correct the path")
    return word


def base_of(config: Path, verb: str) -> str | None:
    """Base that an adapter_config.json names."""
    base = read_json_object(config, verb).get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def with_model(words: Sequence[str], program: str) -> list[str]:
    """Words after a program: a folder that stands first among them is its model, so that
    `eval FOLDER` evaluates what lies there.

    program: its name. Of a run, eval and generate take the held-out rows too, and say so.
    """
    first = next(iter(words), "")
    if "=" in first or first.startswith("-") or not first:
        return list(words)
    first = bring_registered(first)
    if not locate(first).is_dir():
        return list(words)
    folder = open_model_folder(first, None, program)
    given = [f"model.path={folder.model}"]
    given += [f"model.deltas={folder.adapter}"] if folder.adapter is not None else []
    return [*given, *_heldout_rows(first, program, words[1:]), *words[1:]]


def _heldout_rows(word: str, program: str, words: Sequence[str]) -> list[str]:
    """Words that give a program of EVALUATING the held-out table of a run; none for another, and
    where the words name rows themselves."""
    table = EVALUATING.get(program)
    place = locate(word)
    run = next((folder for folder in (place, place.absolute().parent) if is_run(folder)), None)
    named = tuple(f"data.{table}{end}" for end in ("=", ".path=", ".split"))
    named = (*named, "generate.prompt=")
    if table is None or run is None or any(word.startswith(named) for word in words):
        return []
    name, rows = heldout_table(run)
    if rows is None:
        return []
    sys.stderr.write(f"data.{table} is data.{name} of {run / 'program.toml'}\n")
    return [f"data.{table}={inline_text(rows)}"]
