"""Files and tensors that a saved folder carries of the folder that it came from."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from minitune.checkpoint.tensors import opened_tensors
from minitune.checkpoint.weight_files import weight_files
from minitune.io import tensor_names
from minitune.io.safetensors_header import Entry, read_header
from minitune.models.hf_multimodal import text_name
from minitune.models.open import config_json
from minitune.text.folder_files import SINGLE, text_files

CODED = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")  # dtypes of codes, in safetensors' words
PROCESSORS = (  # of images, beside the tokenizer's files
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class Carried(NamedTuple):
    """Content of a folder that this package's decoder does not have: what sees images, for one.

    tensors: memory-mapped, by the names that the folder has them under. stored_names: of the
    weights that the decoder has, by its names for them. files: what else goes with the tensors.
    """

    tensors: Mapping[str, Tensor] = MappingProxyType({})
    stored_names: Mapping[str, str] = MappingProxyType({})
    files: Sequence[Path] = ()


def carried(source: Path) -> Carried:
    """Content of a folder that a save of its text model carries, untouched.

    Nothing where there is none, and where some of it is stored as codes: those need a
    quantization_config, which the text model has no more.
    """
    unread = unmodelled(source)
    if not unread or is_coded(unread):
        return Carried()
    tensors: dict[str, Tensor] = {}
    stored_names: dict[str, str] = {}
    for path in weight_files(source):
        with opened_tensors(path) as file:
            names = list(file.keys())
            tensors |= {name: file.get_tensor(name) for name in names if name in unread}
        stored_names |= {text_name(name) or name: name for name in names if name not in unread}
    files = [source / name for name in PROCESSORS if (source / name).is_file()]
    return Carried(tensors, stored_names, files)


def unmodelled(source: Path) -> dict[str, Entry]:
    """Tensors of a folder that the decoder does not have, by their names there."""
    unread: dict[str, Entry] = {}
    for path in weight_files(source):
        with opened_tensors(path):
            entries = read_header(path)
        unread |= {n: entry for n, entry in entries.items() if tensor_names.is_unmodelled(n)}
    return unread


def is_coded(entries: Mapping[str, Entry]) -> bool:
    """True if a tensor is stored as codes."""
    return any(entry.dtype in CODED for entry in entries.values())


def notes(source: Path, *, text_alone: bool = False) -> list[str]:
    """Lines that say what becomes of all in a folder that is neither a weight of the decoder nor
    a tokenizer; text_alone: of a format that holds nothing else."""
    lines = []
    unread = unmodelled(source)
    if unread and (text_alone or is_coded(unread)):
        lines.append(f"{tensor_names.described(unread)} are left out: only the text model is here")
    elif unread:
        lines.append(f"{tensor_names.described(unread)} are carried as they are in {source}")
    files = _python_files(config_json(source).get("auto_map"))
    if files:
        lines.append(
            f"auto_map of {source / 'config.json'} is left out, as are the files that it names "
            f"({', '.join(files)}): transformers has this family itself"
        )
    return lines


def _python_files(auto_map: object) -> list[str]:
    """Files that the classes of an auto_map stand in: {"AutoConfig": "configuration_x.XConfig"}."""
    names = auto_map.values() if isinstance(auto_map, Mapping) else []
    modules = {str(name).rpartition("--")[2].partition(".")[0] for name in names}
    return [f"{module}.py" for module in sorted(modules)]


def write_text_files(folder: Path, tokenizer: Path, template: str | None) -> None:
    """Put tokenizer and chat templates of another folder into one, byte for byte.

    template: of chats, for a tokenizer's folder that holds none.
    """
    for file in text_files(tokenizer):
        copy = folder / file.relative_to(tokenizer)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    if template is not None:
        (folder / SINGLE).write_text(template, encoding="utf-8")
