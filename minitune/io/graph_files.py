"""Graphs for other runtimes, told from the files of a folder."""

from pathlib import Path
from typing import Literal

GraphFormat = Literal["onnx", "executorch"]
ONNX, PTE = "model.onnx", "model.pte"


def graph_of(folder: Path) -> GraphFormat | None:
    """Format of the graph in a folder, whose config.json is beside no weights; None without one."""
    if (folder / ONNX).is_file():
        return "onnx"
    return "executorch" if (folder / PTE).is_file() else None
