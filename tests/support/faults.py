"""A file layer that fails: at the k-th operation with an error, or from there on, as when the power goes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """What no cleanup survives: from the chosen operation on, nothing reaches the disk any more."""


class Faults:
    """Fails the k-th write, sync, rename, mkdir or removal; with Killed every later one too, with an OSError none."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.left, self.error = at, error
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, self.failing(getattr(os, name)))
        opened = Path.open

        def opens(path: Path, *args: Any, **options: Any) -> Any:
            file = opened(path, *args, **options)
            return Torn(file, self) if "w" in file.mode else file

        patch.setattr(Path, "open", opens)

    def failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 or (self.left < 0 and isinstance(self.error, Killed)):
                raise self.error
            return real(*args, **options)

        return called


class Torn:
    """A file whose write may fail, and then leaves half of its bytes."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: Any) -> None:
        half = len(data) // 2
        self.faults.failing(self.file.write)(data[:half])
        self.faults.failing(self.file.write)(data[half:])

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
