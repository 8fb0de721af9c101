"""Files and tensors that a saved folder carries of the folder that it came from."""

import shutil
from pathlib import Path

from minitune.text.folder_files import SINGLE, text_files


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
