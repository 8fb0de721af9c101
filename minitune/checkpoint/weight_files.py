"""Files that hold the weights of a Hugging Face folder."""

from itertools import groupby
from operator import itemgetter
from pathlib import Path

from minitune.errors import InputError, quoted
from minitune.io.foreign_weights import foreign_weights
from minitune.io.safetensors_header import INDEX, SINGLE, read_weight_map


def weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """Files that hold a model's weights, and what the index says is in each, if there is one.

    InputError for a folder without weights, an index that can't be read, and one that points
    nowhere or out of the folder.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"checkpoint: {_no_weights(folder)}")
        return {folder / SINGLE: frozenset()}
    file_of = read_weight_map(folder, "checkpoint", "download it again")
    for name in sorted(set(file_of.values())):
        _require_file(folder, name)
    if (folder / SINGLE).is_file() and SINGLE not in file_of.values():
        what = f"{folder} holds two models, {SINGLE} and the shards of {INDEX}"
        raise InputError(f"checkpoint: {what}, expected one of them; move the other away")
    by_file = groupby(sorted((file, name) for name, file in file_of.items()), itemgetter(0))
    return {folder / file: frozenset(name for _, name in group) for file, group in by_file}


def _require_file(folder: Path, name: str) -> None:
    """InputError unless a name in an index is that of a file in the same folder."""
    if Path(name).name != name or len(name) > 200:
        found = f"{folder / INDEX} points to {quoted(name)}"
        raise InputError(f"checkpoint: {found}, expected a file name in its own folder")
    if not (folder / name).is_file():
        found = f"{folder / name} does not exist, but {INDEX} points to it"
        raise InputError(f"checkpoint: {found}; download the missing shard")


def _no_weights(folder: Path) -> str:
    """Sentence that says why a folder has no weights, and what to do about it."""
    missing = f"holds neither {SINGLE} nor {INDEX}, expected one of them"
    pickled = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    foreign = foreign_weights(folder)
    if foreign is not None:
        remedy = f"{foreign[0]}: {foreign[1]}"
    elif pickled:
        convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        remedy = f"those of {pickled[0]} are pickled, which is not read: use {convert}"
    elif others:
        remedy = f"{INDEX} says which of its weights is in {quoted(others)}: download it"
    else:
        remedy = "download the weights, or give the model as a shape: config = ..."
    return f"{folder} {missing}; {remedy}"
