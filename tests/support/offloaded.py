"""Models whose blocks lie in a file, and a carrier that does what a stream may do at its worst."""

from pathlib import Path
from typing import Any

import torch

from minitune import tree
from minitune.checkpoint.tensors import file_slices, load_tensors, save_tensors
from minitune.planning.alike import layer_number
from minitune.sharding.offloaded import Carrier, OffloadedTensor, carrier

CPU = torch.device("cpu")


def in_file(params: Any, path: Path, *, stored: torch.dtype | None = None, by: Carrier | None = None) -> dict[str, Any]:
    """Params whose blocks' matrices, dense or quantized, lie in a safetensors file written here, dense ones as `stored`."""
    away = {name: w for name, w in params.items() if layer_number(name) is not None and len(w.shape) > 1}
    flat = dict(tree.items(away))
    save_tensors(path, {name: x if stored is None or not x.is_floating_point() else x.to(stored) for name, x in flat.items()})
    slices, one = file_slices(path), by or carrier(CPU)
    leaves = [OffloadedTensor(slices[name], CPU, x.dtype, one) for name, x in flat.items()]
    return {**params, **tree.rebuild(away, leaves)}


def read_again(params: Any, path: Path) -> dict[str, Any]:
    """Params with what `in_file` wrote in place of the blocks' matrices, as a run without offload has them.

    Products of few rows round by where in memory a matrix begins: these begin where those of the file do.
    """
    tensors = load_tensors(path)
    return {name: _read(name, w, tensors) for name, w in params.items()}


def _read(name: str, w: Any, tensors: Any) -> Any:
    leaves = {path: tensors.get(path, x).to(x.dtype) for path, x in tree.items({name: w})}
    return tree.rebuild(w, leaves.values())
