"""ONNX files in onnxruntime: logits of every batch and length, greedy text with the cache, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx as onnx_package
import onnxruntime
import pytest
import torch
from torch import Tensor

from minitune.checkpoint import FolderExtras
from minitune.errors import InputError
from minitune.inference.generate import greedy
from minitune.interop import graphs, onnx
from minitune.models import FAMILIES, Model
from minitune.models.rope_scaling import LongRope
from minitune.types import Params
from support.families import config_of, sized
from support.models import model_of, random_params
from support.quantized import folder_of, int8

pytestmark = pytest.mark.reference
TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order


def session_of(tmp_path: Path, params: Params, model: Model, **how: Any) -> onnxruntime.InferenceSession:
    extras = FolderExtras(folder_of(tmp_path), [3], template="{{ bos_token }}")
    onnx.save(tmp_path / "onnx", params, model, extras, **{"dtype": "float32", "cache": True, **how})
    return onnxruntime.InferenceSession(str(tmp_path / "onnx/model.onnx"), providers=["CPUExecutionProvider"])


def empty_past(session: onnxruntime.InferenceSession, n_rows: int) -> dict[str, np.ndarray]:
    inputs = [one for one in session.get_inputs() if one.name.startswith("past")]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {one.name: np.zeros((n_rows, one.shape[1], 0, one.shape[3]), types[one.type]) for one in inputs}


def run(
    session: onnxruntime.InferenceSession, tokens: Tensor, mask: Tensor, past: dict[str, np.ndarray]
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Logits, and the past of the next call."""
    outputs = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), **past})
    return torch.from_numpy(outputs[0]), dict(zip(past, outputs[1:], strict=True))


def close(logits: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def check_batches(session: onnxruntime.InferenceSession, params: Params, model: Model, sizes: Sequence[tuple[int, int]]) -> None:
    """Logits of batches of all sizes are ours."""
    for n_rows, length in sizes:
        tokens = torch.randint(0, 17, (n_rows, length), generator=torch.Generator().manual_seed(length))
        logits, _ = run(session, tokens, torch.ones_like(tokens), empty_past(session, n_rows))
        close(logits, model.forward(params, tokens))


def check_decoding(session: onnxruntime.InferenceSession, params: Params, model: Model, n_new: int = 9) -> None:
    """Greedy tokens of two prompts of other lengths, padded on the left, are those of `generate`."""
    prompts = [[5], [2, 11, 7, 3, 3, 16]]
    width = max(map(len, prompts))
    tokens = torch.tensor([[9] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    past, new = empty_past(session, 2), []
    for _ in range(n_new):
        logits, past = run(session, tokens, mask, past)
        new.append(logits[:, -1].argmax(-1))
        tokens, mask = new[-1][:, None], torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    assert torch.stack(new, 1).tolist() == greedy(model, params, prompts, max_new_tokens=n_new, stop_ids=[])


def test_logits_and_greedy_text_are_ours(tmp_path: Path) -> None:
    """One layer with a window and one without, capped scores and logits, four norms."""
    config = sized("gemma2", n_layers=2, window=3, attention_cap=2.0, final_cap=3.0)
    model, params = model_of(config), random_params(config)
    session = session_of(tmp_path, params, model)
    check_batches(session, params, model, [(1, 1), (2, 2), (3, 11)])
    check_decoding(session, params, model)
    # keys and values are appended, and no cache is written in its middle
    assert "ScatterND" not in {node.op_type for node in onnx_package.load(str(tmp_path / "onnx/model.onnx")).graph.node}
    assert (tmp_path / "onnx/tokenizer_config.json").is_file()
    assert (tmp_path / "onnx/config.json").is_file()


@pytest.mark.soak
def test_a_mixture_without_a_cache(tmp_path: Path) -> None:
    config = msgspec.structs.replace(config_of("mixtral"), n_layers=1)
    model, params = model_of(config), random_params(config)
    session = session_of(tmp_path, params, model, cache=False)
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [one.name for one in session.get_outputs()] == ["logits"]
    check_batches(session, params, model, [(1, 1), (3, 7)])


@pytest.mark.soak
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, cache: bool, tmp_path: Path) -> None:
    config = config_of(name)
    model, params = model_of(config), random_params(config)
    session = session_of(tmp_path, params, model, cache=cache)
    check_batches(session, params, model, [(1, 1), (2, 5), (3, 23)])
    if cache:
        check_decoding(session, params, model)


@pytest.mark.soak
def test_float16(tmp_path: Path) -> None:
    config = sized("llama")
    model, params = model_of(config), random_params(config)
    session = session_of(tmp_path, params, model, dtype="float16")
    tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, _ = run(session, tokens, torch.ones_like(tokens), empty_past(session, 2))
    assert logits.dtype == torch.float16
    close(logits.float(), model.forward(params, tokens), 0.02)


def test_what_a_graph_can_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sized("llama", n_layers=1)
    model, params = model_of(config), random_params(config)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=f"onnx: {name} is quantized, expected dense weights; drop the quantize stage"):
        onnx.check({**params, name: int8(params[name])}, model)
    with pytest.raises(InputError, match=f"onnx: {name} holds 1e.05, expected numbers up to 65504 as float16; write float32"):
        session_of(tmp_path, {**params, name: torch.full_like(params[name], 1e5)}, model, dtype="float16")
    monkeypatch.setattr("minitune.interop.graphs.is_installed", lambda name: False)
    with pytest.raises(InputError, match=r"onnx: the package onnx is not installed, .*pip install 'minitune\[onnx\]'"):
        onnx.check(params, model)


def test_a_text_across_the_border_of_longrope_is_said() -> None:
    scaling = LongRope((1.0,) * 4, (2.0,) * 4, original_max_position_embeddings=13)
    assert "beyond 13 tokens keeps the angles" in graphs.notes(model_of(sized("phi3", rope_scaling=scaling)))[0]
    assert graphs.notes(model_of(sized("llama"))) == []
