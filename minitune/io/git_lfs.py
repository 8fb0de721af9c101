"""Git LFS pointers: the small text that stands for a large file in a clone without Git LFS."""

from pathlib import Path

BEGINNING = b"version https://git-lfs.github.com/spec/"
REMEDY = "is a Git LFS pointer and not the file itself; run git lfs pull, or download it again"


def is_pointer(path: Path) -> bool:
    """True if a file is a pointer; False for one that is absent."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(BEGINNING)) == BEGINNING
