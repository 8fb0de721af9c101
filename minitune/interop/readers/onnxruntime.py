"""onnxruntime as the reader of an ONNX file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minitune.interop.readers.reader import Reader

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_onnx(file: Path) -> Reader:
    """ONNX file in onnxruntime on the CPU: with its cache, if it has one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    empty = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), NUMPY_TYPES[one.type])
        for one in session.get_inputs()
        if one.name.startswith("past_key_values.")
    }

    def run(ids: Sequence[int], past: Mapping[str, Any]) -> dict[str, Any]:
        n_past = next((x.shape[2] for x in past.values()), 0)
        mask = np.ones((1, n_past + len(ids)), np.int64)
        tokens = {"input_ids": np.array([list(ids)], np.int64), "attention_mask": mask}
        return dict(zip(outputs, session.run(None, {**tokens, **past}), strict=True))

    def logits(ids: Sequence[int]) -> Float[Tensor, "T V"]:
        return torch.from_numpy(run(ids, empty)["logits"][0]).float()

    def greedy(ids: Sequence[int], n: int) -> list[int]:
        new: list[int] = []
        tokens, past = list(ids), empty
        while len(new) < n:
            found = run(tokens, past)
            new.append(int(found["logits"][0, -1].argmax()))
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            tokens = new[-1:] if past else [*ids, *new]
        return new

    return Reader(("onnxruntime",), logits, greedy)
